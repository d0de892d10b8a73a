"""Small models with random weights, each in the folder form its architecture is published in.

Architectures are real (transformers' own classes), so are the tokenizers' kinds (WordPiece,
Unigram, byte-level BPE, …), trained here on the project's own sentences. Weights are random
but seeded, with larger variance than a fresh model's so that texts lie far apart.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer import modules as st
from sentence_transformers.sparse_encoder import modules as sparse
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from halimede_tools.build.samples.corpus import SENTENCES

VOCABULARY = 1500
BGE_QUERY = "Represent this sentence for searching relevant passages: "


@cache
def wordpiece(cls: str = "[CLS]", sep: str = "[SEP]") -> Tokenizer:
    """BERT's tokenizer; MPNet's with other special tokens."""
    pad, unk, mask = ("<pad>", "[UNK]", "<mask>") if cls == "<s>" else ("[PAD]", "[UNK]", "[MASK]")
    tokenizer = Tokenizer(models.WordPiece(unk_token=unk))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    # BERT's padding is 0; MPNet's is 1, as RoBERTa's.
    special = [cls, pad, sep, unk, mask] if cls == "<s>" else [pad, unk, cls, sep, mask]
    tokenizer.train_from_iterator(
        SENTENCES, trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    return tokenizer


@cache
def unigram() -> Tokenizer:
    """XLM-R's tokenizer: sentencepiece Unigram."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.UnigramTrainer(
            vocab_size=VOCABULARY, special_tokens=special, unk_token="<unk>", show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    return tokenizer


@cache
def byte_level(kind: str) -> Tokenizer:
    """Byte-level BPE: RoBERTa's (`roberta`) or Qwen's, which ends each text (`qwen`)."""
    special = (
        ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if kind == "roberta" else ["<|endoftext|>"]
    )
    tokenizer = Tokenizer(models.BPE())
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if kind == "roberta":
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <|endoftext|>",
            pair="$A $B <|endoftext|>",
            special_tokens=[("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))],
        )
    return tokenizer


@cache
def gemma() -> Tokenizer:
    """Gemma's tokenizer: BPE over ▁-joined text with byte fallback."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        pair="<bos> $A <eos> $B <eos>",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<bos>", "<eos>")],
    )
    return tokenizer


@cache
def clip_bpe() -> Tokenizer:
    """CLIP's tokenizer: lower-cased byte-level BPE with end-of-word marks."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"),
                behavior="removed",
                invert=True,
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<|startoftext|>", "<|endoftext|>"],
            end_of_word_suffix="</w>",
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    start, end = (tokenizer.token_to_id(t) for t in ("<|startoftext|>", "<|endoftext|>"))
    tokenizer.post_processor = processors.RobertaProcessing(
        ("<|endoftext|>", end), ("<|startoftext|>", start), trim_offsets=False
    )
    return tokenizer


def save(
    folder: Path, model: hf.PreTrainedModel, tokenizer: Tokenizer, max_tokens: int, **special: Any
) -> Path:
    """A plain transformers folder: config.json, model.safetensors, tokenizer files."""
    model.eval().save_pretrained(folder)
    hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.to_str()),
        model_max_length=max_tokens,
        **special,
    ).save_pretrained(folder)
    return folder


BERT_TOKENS = dict(
    pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
)
ROBERTA_TOKENS = dict(
    bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>",
    pad_token="<pad>", unk_token="<unk>", mask_token="<mask>",
)  # fmt: skip
TEXT_INPUTS = dict(model_input_names=["input_ids", "attention_mask"])
"""For models without token types."""
SIZES = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    initializer_range=0.2,
)


def build(model_class: Callable, config: hf.PretrainedConfig) -> hf.PreTrainedModel:
    """A model of this architecture with seeded random weights."""
    torch.manual_seed(7)
    return model_class(config)


def bert(folder: Path) -> Path:
    """Plain BERT folder, as PubMedBERT's."""
    config = hf.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=512, **SIZES)
    return save(folder, build(hf.BertModel, config), wordpiece(), 512, **BERT_TOKENS)


def bert_unigram(folder: Path) -> Path:
    """BERT with a Unigram tokenizer, as paraphrase-multilingual-MiniLM."""
    config = hf.BertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=512, pad_token_id=0, **SIZES
    )
    return save(folder, build(hf.BertModel, config), unigram(), 512, **ROBERTA_TOKENS)


def mpnet(folder: Path) -> Path:
    """MPNet: no token types, positions begin at 2."""
    config = hf.MPNetConfig(vocab_size=VOCABULARY, max_position_embeddings=514, **SIZES)
    tokens = {**ROBERTA_TOKENS, "unk_token": "[UNK]"}
    return save(folder, build(hf.MPNetModel, config), wordpiece("<s>", "</s>"), 512, **tokens)


def distilbert(folder: Path) -> Path:
    """DistilBERT: no token types."""
    config = hf.DistilBertConfig(
        vocab_size=VOCABULARY, dim=64, n_layers=2, n_heads=4, hidden_dim=128, initializer_range=0.2
    )
    tokens = {**BERT_TOKENS, "model_input_names": ["input_ids", "attention_mask"]}
    return save(folder, build(hf.DistilBertModel, config), wordpiece(), 512, **tokens)


def xlm_roberta(folder: Path) -> Path:
    """XLM-R: Unigram tokenizer, positions begin at 2."""
    config = hf.XLMRobertaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=514, type_vocab_size=1, **SIZES
    )
    return save(folder, build(hf.XLMRobertaModel, config), unigram(), 512, **ROBERTA_TOKENS)


def roberta(folder: Path) -> Path:
    """Plain RoBERTa folder, as CodeBERT's; its tokenizer names no limit of its own."""
    config = hf.RobertaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=130, type_vocab_size=1, **SIZES
    )
    return save(
        folder, build(hf.RobertaModel, config), byte_level("roberta"), 10**30, **ROBERTA_TOKENS
    )


def qwen3(folder: Path) -> Path:
    """Qwen3: a causal decoder whose texts end with a token; padded on the left."""
    config = hf.Qwen3Config(
        vocab_size=VOCABULARY, num_key_value_heads=2, head_dim=16, max_position_embeddings=1024,
        eos_token_id=0, bos_token_id=0, **SIZES,
    )  # fmt: skip
    return save(
        folder, build(hf.Qwen3Model, config), byte_level("qwen"), 1024,
        pad_token="<|endoftext|>", eos_token="<|endoftext|>", padding_side="left",
    )  # fmt: skip


def gemma3(folder: Path) -> Path:
    """Gemma 3 with attention in both directions, as EmbeddingGemma."""
    config = hf.Gemma3TextConfig(
        vocab_size=VOCABULARY, num_key_value_heads=1, head_dim=16, max_position_embeddings=512,
        sliding_window=64, layer_types=["sliding_attention", "full_attention"],
        use_bidirectional_attention=True, query_pre_attn_scalar=16, **SIZES,
    )  # fmt: skip
    return save(
        folder, build(hf.Gemma3TextModel, config), gemma(), 512,
        pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
    )  # fmt: skip


def clip(folder: Path) -> Path:
    """CLIP with both towers; texts of at most 77 tokens."""
    tower = dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        projection_dim=32,
    )  # fmt: skip
    vision = dict(tower, image_size=32, patch_size=16)
    _clip(folder, tower, vision, projection_dim=32, initializer_factor=5.0)
    hf.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return folder


def clip_vit_b32(folder: Path) -> Path:
    """CLIP whose vision tower is ViT-B/32 with four of its twelve layers, which differ in weights
    alone and make building it slow; its text tower is small.
    """
    text = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    _clip(
        folder, text, dict(image_size=224, patch_size=32, num_hidden_layers=4), projection_dim=512
    )
    hf.CLIPImageProcessor().save_pretrained(folder)
    return folder


def _clip(folder: Path, text: dict, vision: dict, **fields: Any) -> None:
    end = clip_bpe().token_to_id("<|endoftext|>")
    start = clip_bpe().token_to_id("<|startoftext|>")
    text = dict(text, vocab_size=VOCABULARY, eos_token_id=end, bos_token_id=start, pad_token_id=end)
    config = hf.CLIPConfig(text_config=text, vision_config=vision, **fields)
    save(
        folder, build(hf.CLIPModel, config), clip_bpe(), 77,
        pad_token="<|endoftext|>", eos_token="<|endoftext|>", bos_token="<|startoftext|>",
        unk_token="<|endoftext|>",
    )  # fmt: skip


def sentence_transformer(
    base: Callable[[Path], Path],
    folder: Path,
    *modules: Any,
    max_tokens: int | None = None,
    prompts: Mapping[str, str] | None = None,
    default_prompt: str | None = None,
) -> Path:
    """A sentence-transformers folder of `base` and these further modules."""
    plain = base(folder.with_name(folder.name + "-plain"))
    model = SentenceTransformer(
        modules=[st.Transformer(str(plain), max_seq_length=max_tokens), *modules],
        prompts=dict(prompts or {}),
        default_prompt_name=default_prompt,
        device="cpu",
    )
    model.save(str(folder), create_model_card=False)
    return folder


def dense(inputs: int, outputs: int, activation: torch.nn.Module) -> st.Dense:
    """A Dense layer with seeded random weights."""
    torch.manual_seed(11)
    return st.Dense(inputs, outputs, activation_function=activation)


def like_minilm(folder: Path) -> Path:
    return sentence_transformer(
        bert, folder, st.Pooling(64, "mean"), st.Normalize(), max_tokens=256
    )


def like_bge(folder: Path) -> Path:
    return sentence_transformer(
        bert, folder, st.Pooling(64, "cls"), st.Normalize(), max_tokens=512,
        prompts={"query": BGE_QUERY},
    )  # fmt: skip


def like_e5(folder: Path) -> Path:
    return sentence_transformer(
        bert, folder, st.Pooling(64, "mean"), st.Normalize(), max_tokens=512,
        prompts={"query": "query: ", "passage": "passage: "},
    )  # fmt: skip


def like_multilingual_minilm(folder: Path) -> Path:
    return sentence_transformer(bert_unigram, folder, st.Pooling(64, "mean"), max_tokens=128)


def like_mpnet(folder: Path) -> Path:
    return sentence_transformer(
        mpnet, folder, st.Pooling(64, "mean"), st.Normalize(), max_tokens=384
    )


def like_distiluse(folder: Path) -> Path:
    head = dense(64, 48, torch.nn.Tanh())
    return sentence_transformer(distilbert, folder, st.Pooling(64, "mean"), head, max_tokens=128)


def like_qwen3(folder: Path) -> Path:
    return sentence_transformer(
        qwen3, folder, st.Pooling(64, "lasttoken"), st.Normalize(),
        prompts={"query": "Instruct: Given a web search query\nQuery:", "document": ""},
    )  # fmt: skip


def like_embeddinggemma(folder: Path) -> Path:
    return sentence_transformer(
        gemma3, folder, st.Pooling(64, "mean"), dense(64, 128, torch.nn.Identity()),
        dense(128, 64, torch.nn.Identity()), st.Normalize(), max_tokens=512,
        prompts={"query": "task: search result | query: ", "document": "title: none | text: "},
    )  # fmt: skip


def like_bge_m3(folder: Path) -> Path:
    """XLM-R with bge-m3's two further heads beside the dense one."""
    sentence_transformer(xlm_roberta, folder, st.Pooling(64, "cls"), st.Normalize(), max_tokens=512)
    torch.manual_seed(13)
    torch.save(torch.nn.Linear(64, 1).state_dict(), folder / "sparse_linear.pt")
    torch.save(torch.nn.Linear(64, 64).state_dict(), folder / "colbert_linear.pt")
    return folder


def like_sentence_clip(folder: Path) -> Path:
    """CLIP in the form of sentence-transformers' clip-ViT models."""
    clip(folder / "0_CLIPModel")
    modules = [
        {
            "idx": 0,
            "name": "0",
            "path": "0_CLIPModel",
            "type": "sentence_transformers.models.CLIPModel",
        }
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def bert_reranker(folder: Path, labels: int = 1) -> Path:
    """BERT for sequence classification, as ms-marco-MiniLM: pairs have token types."""
    config = hf.BertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=512, num_labels=labels, **SIZES
    )
    model = build(hf.BertForSequenceClassification, config)
    return save(folder, model, wordpiece(), 512, **BERT_TOKENS)


def xlm_reranker(folder: Path) -> Path:
    """XLM-R for sequence classification, as bge-reranker-v2-m3: no token types."""
    config = hf.XLMRobertaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=514, type_vocab_size=1, num_labels=1, **SIZES
    )
    model = build(hf.XLMRobertaForSequenceClassification, config)
    return save(folder, model, unigram(), 512, **ROBERTA_TOKENS, **TEXT_INPUTS)


MODERNBERT = dict(
    vocab_size=VOCABULARY, max_position_embeddings=1024, pad_token_id=0, cls_token_id=2,
    sep_token_id=3, bos_token_id=2, eos_token_id=3, global_attn_every_n_layers=2,
    local_attention=32, reference_compile=False, **SIZES,
)  # fmt: skip


def modernbert(folder: Path) -> Path:
    """ModernBERT: rotary positions, local attention in every other layer, no token types."""
    model = build(hf.ModernBertModel, hf.ModernBertConfig(**MODERNBERT))
    return save(folder, model, wordpiece(), 1024, **BERT_TOKENS, **TEXT_INPUTS)


def like_gte_modernbert(folder: Path) -> Path:
    return sentence_transformer(modernbert, folder, st.Pooling(64, "cls"), max_tokens=1024)


def like_modernbert_embed(folder: Path) -> Path:
    return sentence_transformer(
        modernbert, folder, st.Pooling(64, "mean"), st.Normalize(), max_tokens=1024,
        prompts={"query": "search_query: ", "document": "search_document: "},
    )  # fmt: skip


def modernbert_reranker(folder: Path) -> Path:
    """ModernBERT for sequence classification, as gte-reranker-modernbert."""
    config = hf.ModernBertConfig(num_labels=1, **MODERNBERT)
    model = build(hf.ModernBertForSequenceClassification, config)
    return save(folder, model, wordpiece(), 512, **BERT_TOKENS, **TEXT_INPUTS)


def like_cross_encoder(folder: Path, labels: int = 1) -> Path:
    """The folder of a CrossEncoder that sentence-transformers saved, its activation in it."""
    plain = bert_reranker(folder.with_name(folder.name + "-plain"), labels)
    model = CrossEncoder(str(plain), device="cpu", activation_fn=torch.nn.Identity())
    model.save_pretrained(str(folder), create_model_card=False)
    return folder


def nli_classifier(folder: Path) -> Path:
    """A CrossEncoder with three labels, for pairs of texts."""
    return like_cross_encoder(folder, labels=3)


def topic_classifier(folder: Path) -> Path:
    """A plain classifier with four named labels, for texts."""
    folder = bert_reranker(folder, labels=4)
    config = json.loads((folder / "config.json").read_text())
    names = ["arts", "sports", "science", 'the "rest"']
    config |= {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _static_table(width: int = 128) -> torch.Tensor:
    torch.manual_seed(17)
    return torch.randn(wordpiece().get_vocab_size(), width)


def like_static(folder: Path) -> Path:
    """A StaticEmbedding that sentence-transformers saved, as static-retrieval-mrl-en-v1."""
    tokenizer = Tokenizer.from_str(wordpiece().to_str())
    module = st.StaticEmbedding(tokenizer, embedding_weights=_static_table())
    model = SentenceTransformer(modules=[module], device="cpu")
    model.save(str(folder), create_model_card=False)
    return folder


def like_potion(folder: Path) -> Path:
    """A potion model with sentence-transformers' files beside those of model2vec."""
    module = st.StaticEmbedding(
        Tokenizer.from_str(wordpiece().to_str()), embedding_weights=_static_table()
    )
    model = SentenceTransformer(modules=[module, st.Normalize()], device="cpu")
    model.save(str(folder), create_model_card=False)
    return folder


def model2vec_plain(folder: Path) -> Path:
    """A model2vec folder without sentence-transformers' files, vectors of any length."""
    folder.mkdir(parents=True)
    save_file({"embeddings": _static_table()}, folder / "model.safetensors")
    wordpiece().save(str(folder / "tokenizer.json"))
    config = {"model_type": "model2vec", "normalize": False, "max_length": 64}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def model2vec(folder: Path) -> Path:
    """A model2vec folder as model2vec saves one whose vocabulary was clustered: weights, a mapping
    of ids, and a modules.json.
    """
    folder.mkdir(parents=True)
    table, count = _static_table(), wordpiece().get_vocab_size()
    tensors = {
        "embeddings": table[: count // 2].half(),
        "weights": torch.rand(count),
        "mapping": torch.randint(0, count // 2, (count,)),
    }
    save_file(tensors, folder / "model.safetensors")
    wordpiece().save(str(folder / "tokenizer.json"))
    config = {"model_type": "model2vec", "normalize": True, "hidden_dim": table.shape[1]}
    (folder / "config.json").write_text(json.dumps(config))
    names = {"": "StaticEmbedding", "1_Normalize": "Normalize"}
    modules = [
        {
            "idx": place,
            "name": str(place),
            "path": path,
            "type": f"sentence_transformers.models.{name}",
        }
        for place, (path, name) in enumerate(names.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def bert_mlm(folder: Path, vocabulary: int = VOCABULARY) -> Path:
    """Plain BERT for masked language modelling, as naver/splade's."""
    config = hf.BertConfig(vocab_size=vocabulary, max_position_embeddings=512, **SIZES)
    model = build(hf.BertForMaskedLM, config)
    return save(folder, _sparsely(model), wordpiece(), 512, **BERT_TOKENS)


def wide_bert_mlm(folder: Path) -> Path:
    """As `bert_mlm`, with a vocabulary that the build divides into three parts."""
    return bert_mlm(folder, 9000)


def distilbert_mlm(folder: Path) -> Path:
    """DistilBERT for masked language modelling, as opensearch-neural-sparse-encoding's."""
    config = hf.DistilBertConfig(
        vocab_size=VOCABULARY, dim=64, n_layers=2, n_heads=4, hidden_dim=128, initializer_range=0.2
    )
    model = build(hf.DistilBertForMaskedLM, config)
    return save(folder, _sparsely(model), wordpiece(), 512, **BERT_TOKENS, **TEXT_INPUTS)


def roberta_mlm(folder: Path) -> Path:
    """RoBERTa for masked language modelling."""
    config = hf.RobertaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=130, type_vocab_size=1, **SIZES
    )
    model = build(hf.RobertaForMaskedLM, config)
    return save(folder, _sparsely(model), byte_level("roberta"), 128, **ROBERTA_TOKENS)


def xlm_roberta_mlm(folder: Path) -> Path:
    """XLM-R for masked language modelling."""
    config = hf.XLMRobertaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=514, type_vocab_size=1, **SIZES
    )
    model = build(hf.XLMRobertaForMaskedLM, config)
    return save(folder, _sparsely(model), unigram(), 512, **ROBERTA_TOKENS)


def _sparsely(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """The model with a bias that leaves about one logit of ten above 0, as SPLADE's training does."""
    torch.manual_seed(17)
    decoder = model.get_output_embeddings()
    spread = decoder.weight.detach().norm(dim=1).mean()
    decoder.bias.data = spread * (torch.randn(len(decoder.bias)) / 4 - 2.5)
    return model


def sparse_encoder(
    base: Callable[[Path], Path],
    folder: Path,
    pooling: str = "max",
    activation: str = "relu",
    max_active_dims: int | None = None,
    prompts: Mapping[str, str] | None = None,
) -> Path:
    """The folder of a SparseEncoder with SpladePooling that sentence-transformers saved."""
    plain = base(folder.with_name(folder.name + "-plain"))
    model = SparseEncoder(
        modules=[
            st.Transformer(str(plain), transformer_task="fill-mask", max_seq_length=256),
            sparse.SpladePooling(pooling, activation),
        ],
        prompts=dict(prompts or {}),
        device="cpu",
    )
    model.save(str(folder), create_model_card=False)
    _set(folder / "config_sentence_transformers.json", max_active_dims=max_active_dims)
    return folder


def _set(path: Path, **fields: Any) -> None:
    """Write fields into a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=2))


def like_splade(folder: Path) -> Path:
    """SPLADE with its modules named as sentence-transformers 5.0 did."""
    sparse_encoder(bert_mlm, folder)
    path = folder / "modules.json"
    modules = json.loads(path.read_text())
    modules[0]["type"] = "sentence_transformers.sparse_encoder.models.MLMTransformer"
    modules[1]["type"] = "sentence_transformers.sparse_encoder.models.SpladePooling"
    path.write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 256, "do_lower_case": False})
    )
    return folder


def like_granite_sparse(folder: Path) -> Path:
    """RoBERTa with SpladePooling."""
    return sparse_encoder(roberta_mlm, folder)


def like_splade_with_sums(folder: Path) -> Path:
    """The first SPLADE: weights are summed over tokens; queries have a prompt."""
    return sparse_encoder(roberta_mlm, folder, "sum", prompts={"query": "query: "})


def like_opensearch_sparse(folder: Path) -> Path:
    """DistilBERT with a second logarithm."""
    return sparse_encoder(distilbert_mlm, folder, activation="log1p_relu")


def mute_splade(folder: Path) -> Path:
    """BERT for masked language modelling whose logits are all below 0."""
    bert_mlm(folder)
    model = hf.BertForMaskedLM.from_pretrained(folder)
    torch.nn.init.constant_(model.get_output_embeddings().bias, -1e4)
    model.save_pretrained(folder)
    return folder


def splade_with_few_ids(folder: Path) -> Path:
    """XLM-R with at most 40 weights for a text."""
    return sparse_encoder(xlm_roberta_mlm, folder, max_active_dims=40)


def sparse_auto_encoder(folder: Path) -> Path:
    """A dense model with a sparse auto-encoder behind it, as CSR models."""
    plain = bert(folder.with_name(folder.name + "-plain"))
    torch.manual_seed(19)
    modules = [st.Transformer(str(plain), max_seq_length=256), st.Pooling(64, "mean")]
    encoder = sparse.SparseAutoEncoder(input_dim=64, hidden_dim=256, k=32, normalize=True)
    encoder.latent_bias.data = torch.randn(256) / 4
    model = SparseEncoder(modules=[*modules, encoder], device="cpu")
    model.save(str(folder), create_model_card=False)
    return folder


COLBERT_METADATA = {
    "query_token_id": "[unused0]", "doc_token_id": "[unused1]", "query_token": "[Q]",
    "doc_token": "[D]", "dim": 32, "query_maxlen": 32, "doc_maxlen": 180, "similarity": "cosine",
    "mask_punctuation": True, "attend_to_mask_tokens": False, "interaction": "colbert",
}  # fmt: skip
"""The part of colbertv2.0's artifact.metadata that decides vectors."""


def with_markers(*markers: str) -> Tokenizer:
    """BERT's tokenizer with these tokens at the end of its vocabulary, in place of others."""
    tokenizer = json.loads(wordpiece().to_str())
    vocabulary = tokenizer["model"]["vocab"]
    last = sorted(vocabulary, key=vocabulary.__getitem__)[-len(markers) :]
    for marker, replaced in zip(markers, last, strict=True):
        vocabulary[marker] = vocabulary.pop(replaced)
    return Tokenizer.from_str(json.dumps(tokenizer))


def like_colbert(folder: Path, **metadata: Any) -> Path:
    """A ColBERT checkpoint, as colbertv2.0: `linear.weight` beside the weights of BERT."""
    config = hf.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=512, **SIZES)
    save(folder, build(hf.BertModel, config), with_markers("[unused0]", "[unused1]"), 512,
         **BERT_TOKENS)  # fmt: skip
    tensors = {
        f"bert.{key}": value for key, value in load_file(folder / "model.safetensors").items()
    }
    torch.manual_seed(19)
    fields = COLBERT_METADATA | metadata
    tensors["linear.weight"] = torch.randn(fields["dim"], 64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _set(folder / "config.json", architectures=["HF_ColBERT"])
    (folder / "artifact.metadata").write_text(json.dumps(fields))
    return folder


def like_attending_colbert(folder: Path) -> Path:
    """A checkpoint whose queries attend to what fills them up, with no vector left out."""
    return like_colbert(folder, attend_to_mask_tokens=True, mask_punctuation=False, query_maxlen=24)


def pylate(
    folder: Path, base: Callable[[Path], Path], *layers: tuple[int, int], **settings: Any
) -> Path:
    """A folder as PyLate saves it: a Transformer and Dense modules without bias."""
    base(folder)
    transformer = st.Transformer(str(folder), max_seq_length=179)
    transformer.save(str(folder))
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    ]
    for index, (inputs, outputs) in enumerate(layers, 1):
        path = folder / f"{index}_Dense"
        path.mkdir()
        torch.manual_seed(19 + index)
        tensors = {"linear.weight": torch.randn(outputs, inputs)}
        if settings.get("residual"):
            tensors["residual.weight"] = torch.randn(outputs, inputs)
        save_file(tensors, path / "model.safetensors")
        config = {
            "in_features": inputs, "out_features": outputs, "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
            "use_residual": bool(settings.get("residual")),
        }  # fmt: skip
        (path / "config.json").write_text(json.dumps(config))
        modules.append(
            {
                "idx": index,
                "name": str(index),
                "path": path.name,
                "type": "pylate.models.Dense.Dense",
            }
        )
    (folder / "modules.json").write_text(json.dumps(modules))
    fields = {
        "model_type": "ColBERT", "prompts": {}, "default_prompt_name": None,
        "similarity_fn_name": "MaxSim", "query_prefix": "[Q] ", "document_prefix": "[D] ",
        "query_length": 32, "document_length": 180, "attend_to_expansion_tokens": False,
        "skiplist_words": list(string.punctuation), "do_query_expansion": True,
    }  # fmt: skip
    fields |= {key: value for key, value in settings.items() if key in fields}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(fields))
    return folder


def _with_prefixes(folder: Path) -> None:
    """Add PyLate's markers to a folder's model and tokenizer, as its constructor does."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[Q] ", "[D] "])
    model = hf.AutoModel.from_pretrained(folder)
    torch.manual_seed(23)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _pylate_modernbert(folder: Path) -> Path:
    config = hf.ModernBertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=1024,
        pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3,
        global_attn_every_n_layers=2, local_attention=128, reference_compile=False, **SIZES,
    )  # fmt: skip
    model = build(hf.ModernBertModel, config)
    save(folder, model, wordpiece(), 1024, **BERT_TOKENS, **TEXT_INPUTS)
    _with_prefixes(folder)
    return folder


def _pylate_bert(folder: Path) -> Path:
    bert(folder)
    _with_prefixes(folder)
    return folder


def like_pylate(folder: Path) -> Path:
    """PyLate's BERT, with the settings it has by default."""
    return pylate(folder, _pylate_bert, (64, 32))


def like_modern_colbert(folder: Path) -> Path:
    """PyLate's ModernBERT with two Dense modules, as GTE-ModernColBERT and its successors."""
    return pylate(
        folder, _pylate_modernbert, (64, 128), (128, 32), residual=True, document_length=300,
        query_length=48,
    )  # fmt: skip


def like_pylate_without_expansion(folder: Path) -> Path:
    """PyLate's BERT whose queries keep their length, with a prompt and few skipped words."""
    return pylate(
        folder, _pylate_bert, (64, 32), do_query_expansion=False, skiplist_words=["a", ",", "zzz9"],
        prompts={"query": "what: ", "document": ""}, document_length=64,
    )  # fmt: skip


def like_router(folder: Path) -> Path:
    """A table of vectors for queries and BERT for documents, in one space, normalised after."""
    plain = bert(folder.with_name(folder.name + "-plain"))
    tokenizer = Tokenizer.from_str(wordpiece().to_str())
    router = st.Router.for_query_document(
        [st.StaticEmbedding(tokenizer, embedding_weights=_static_table(64))],
        [st.Transformer(str(plain), max_seq_length=128), st.Pooling(64, "mean")],
    )
    prompts = {"query": "find: ", "document": "text: ", "passage": "passage: "}
    model = SentenceTransformer(modules=[router, st.Normalize()], prompts=prompts, device="cpu")
    model.save(str(folder), create_model_card=False)
    return folder


def like_asym(folder: Path) -> Path:
    """Asym, as Router was called, behind BERT: a Dense for `query` and another one for `doc`."""
    routes = {
        "query": [dense(64, 48, torch.nn.Tanh())],
        "doc": [st.Dense(64, 48, activation_function=torch.nn.Identity())],
    }
    sentence_transformer(bert, folder, st.Pooling(64, "mean"), st.Router(routes), max_tokens=128)
    router = folder / "2_Router"
    (router / "router_config.json").rename(router / "config.json")
    modules = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text(
        modules.replace(
            "sentence_transformers.base.modules.router.Router", "sentence_transformers.models.Asym"
        )
    )
    return folder


def like_mapped_router(folder: Path) -> Path:
    """A Router with mappings of task and modality, and no route for a text without a task."""
    table = _static_table(64)
    parts = {
        name: [
            st.StaticEmbedding(Tokenizer.from_str(wordpiece().to_str()), embedding_weights=weights)
        ]
        for name, weights in (("one", table), ("two", table.flip(0)))
    }
    mappings: Any = {("query", "text"): "one", ("document", None): "two"}
    router = st.Router(parts, allow_empty_key=False, route_mappings=mappings)
    SentenceTransformer(modules=[router], device="cpu").save(str(folder), create_model_card=False)
    return folder


def like_router_of_one_route(folder: Path) -> Path:
    """A Router with one route for all texts."""
    plain = bert(folder.with_name(folder.name + "-plain"))
    router = st.Router({"text": [st.Transformer(str(plain), max_seq_length=128)]})
    model = SentenceTransformer(modules=[router, st.Pooling(64, "mean")], device="cpu")
    model.save(str(folder), create_model_card=False)
    return folder


RERANKER_TEMPLATE = (
    "<|im_start|>system\nJudge the document by the query. Answer yes or no.<|im_end|>\n"
    "<|im_start|>user\n<Instruct>: "
    "{{ messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first "
    "| default('Find passages that answer the query') }}\n"
    "<Query>: {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}"
    "\n<Document>: "
    "{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}"
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
"""The chat of Qwen3-Reranker, an instruction as its system message."""


def qwen3_reranker(folder: Path, template: str | None = RERANKER_TEMPLATE) -> Path:
    """Qwen3 for causal language modelling that answers yes or no, as Qwen3-Reranker."""
    tokenizer = Tokenizer.from_str(byte_level("qwen").to_str())
    tokenizer.add_tokens(["yes", "no"])
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    config = hf.Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(), num_key_value_heads=2, head_dim=16,
        max_position_embeddings=256, eos_token_id=0, bos_token_id=0, tie_word_embeddings=True,
        **SIZES,
    )  # fmt: skip
    save(
        folder, build(hf.Qwen3ForCausalLM, config), tokenizer, 256,
        pad_token="<|endoftext|>", eos_token="<|im_end|>", padding_side="left",
    )  # fmt: skip
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def like_decoder_reranker(folder: Path) -> Path:
    """A decoder that CrossEncoder saved, with an instruction as its prompt and yes alone."""
    plain = qwen3_reranker(folder.with_name(folder.name + "-plain"))
    model = CrossEncoder(
        str(plain), device="cpu", prompts={"search": "Find what answers"},
        default_prompt_name="search", activation_fn=torch.nn.Identity(),
    )  # fmt: skip
    model[1].false_token_id = None
    model.save_pretrained(str(folder), create_model_card=False)
    return folder


def decoder_reranker_without_a_template(folder: Path) -> Path:
    """A decoder whose tokenizer joins the two texts of a pair."""
    return qwen3_reranker(folder, template=None)


def xlnet_tokens() -> Tokenizer:
    """XLNet's form: the special tokens are at the end, the last of them of a type of its own."""
    tokenizer = Tokenizer.from_str(wordpiece().to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A:0 [SEP]:0 [CLS]:2",
        pair="$A:0 [SEP]:0 $B:1 [SEP]:1 [CLS]:2",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def xlnet(folder: Path) -> Path:
    """XLNet: relative positions, no token limit, padded on the left."""
    config = hf.XLNetConfig(
        vocab_size=VOCABULARY, d_model=64, n_layer=2, n_head=4, d_inner=128, initializer_range=0.2
    )
    model = build(hf.XLNetModel, config)
    return save(folder, model, xlnet_tokens(), 10**30, padding_side="left", **BERT_TOKENS)


def mixtral(folder: Path) -> Path:
    """A mixture of experts."""
    config = hf.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    return save(folder, build(hf.MixtralModel, config), wordpiece(), 256, **BERT_TOKENS)


def mamba(folder: Path) -> Path:
    """A state-space model."""
    config = hf.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8, pad_token_id=0
    )
    return save(folder, build(hf.MambaModel, config), wordpiece(), 512, **BERT_TOKENS)


def deberta_v2(folder: Path, model_class: Callable = hf.DebertaV2Model, **fields: Any) -> Path:
    """DeBERTa-v2: relative positions of two kinds."""
    config = hf.DebertaV2Config(
        vocab_size=VOCABULARY, max_position_embeddings=512, relative_attention=True,
        pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0,
        position_buckets=32, norm_rel_ebd="layer_norm", share_att_key=True, **SIZES, **fields,
    )  # fmt: skip
    return save(folder, build(model_class, config), wordpiece(), 512, **BERT_TOKENS)


def deberta_reranker(folder: Path) -> Path:
    """DeBERTa-v2 for sequence classification, as mxbai-rerank."""
    return deberta_v2(folder, hf.DebertaV2ForSequenceClassification, num_labels=1)


def longformer(folder: Path) -> Path:
    """Longformer: attention within windows."""
    config = hf.LongformerConfig(
        vocab_size=VOCABULARY, max_position_embeddings=514, attention_window=32, hidden_size=64,
        num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, initializer_range=0.2,
        pad_token_id=1,
    )  # fmt: skip
    model = build(hf.LongformerModel, config)
    return save(folder, model, byte_level("roberta"), 512, **ROBERTA_TOKENS)
