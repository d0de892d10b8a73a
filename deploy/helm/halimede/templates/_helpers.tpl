{{/* Metadata: names begin with the prefix; labels say which release made an object. */}}
{{- define "halimede.metadata" -}}
name: {{ .root.Values.prefix }}{{ .name }}
namespace: {{ .root.Release.Namespace }}
labels:
  app.kubernetes.io/part-of: halimede
  app.kubernetes.io/instance: {{ .root.Release.Name }}
  app.kubernetes.io/managed-by: {{ .root.Release.Service }}
  app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
  helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* An image: the registry, the name, and the tag or the chart's appVersion. */}}
{{- define "halimede.image" -}}
{{- with .root.Values.registry }}{{ . | trimSuffix "/" }}/{{ end }}{{ .name }}:{{ .tag | default .root.Chart.AppVersion }}
{{- end }}

{{/* Claim of the volume of the models. */}}
{{- define "halimede.claim" -}}
{{ .Values.models.claim | default (printf "%smodels" .Values.prefix) }}
{{- end }}

{{/* What every pod has: no rights that it does not need. */}}
{{- define "halimede.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "halimede.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Who may ask: pods and namespaces with the label. */}}
{{- define "halimede.clients" -}}
- podSelector:
    matchLabels: {{ dict .Values.networkPolicy.clientLabel "true" | toJson }}
- namespaceSelector:
    matchLabels: {{ dict .Values.networkPolicy.clientLabel "true" | toJson }}
{{- end }}

{{/* The gateway's configuration: the model on the servers, Redis if there is one, and the values. */}}
{{- define "halimede.gatewayConfig" -}}
{{- $model := dict "provider" "triton" "model_id" .Values.model "url" (printf "%striton-grpc:8001" .Values.prefix) }}
{{- $gateway := dict "kserve_url" (printf "http://%striton:8000" .Values.prefix) }}
{{- $config := dict "models" (dict .Values.model $model) "gateway" $gateway }}
{{- if .Values.redis.enabled }}
{{- $_ := set $config "cache" (dict "redis" (dict "url" (printf "redis://%sredis:6379/0" .Values.prefix))) }}
{{- $_ := set $gateway "limits_storage" (printf "redis://%sredis:6379" .Values.prefix) }}
{{- end }}
{{- if .Values.gateway.requireKeys }}
{{- $_ := set $gateway "keys" "/etc/halimede-keys/keys.yaml" }}
{{- end }}
{{- mergeOverwrite $config .Values.gateway.config | toYaml }}
{{- end }}
