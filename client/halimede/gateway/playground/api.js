// What the page asks the gateway. Nothing goes to another origin.

const KEY = "halimede-key";

export const key = () => sessionStorage.getItem(KEY) ?? "";

export function useKey(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

/** An error in words, with the HTTP status of the answer; 0 if none came. */
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** Returns the answer of `playground/api/…` as an object. A body makes it a POST. */
export async function ask(name, body) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (key()) headers.Authorization = `Bearer ${key()}`;
  let answer;
  try {
    answer = await fetch(`playground/api/${name}`, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
    });
  } catch {
    throw new Refused("The gateway does not answer. Is it running?", 0);
  }
  const found = await answer.json().catch(() => ({}));
  if (answer.ok) return found;
  const message = found.error?.message ?? `The gateway answered with status ${answer.status}.`;
  throw new Refused(message[0].toUpperCase() + message.slice(1), answer.status);
}

/** Returns a file's bytes in base64. */
export function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Refused(`${file.name} cannot be read.`, 0));
    reader.readAsDataURL(file);
  });
}
