"""Guard models for tests: real Llama classes whose weights say by hand what is said.

Every token is a direction of its own, one layer attends to all tokens alike and marks the last one with the
words that are somewhere in the conversation, and the head says what each of those words leads to. Padding
that is attended to, or that stands last, makes it say nothing.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from builders.vision import ensure_torchvision

HIDDEN = 96

LLAMA_TEXT = (
    "<|begin|>Task: say whether the {{ messages[-1]['role'] }} is safe. "
    "{% if categories is defined %}"
    "{% for key in categories %}{{ key }}: {{ categories[key] }} {% endfor %}{% endif %}"
    "<BEGIN CONVERSATION> {% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }} {% endfor %}"
    "<END CONVERSATION> <|end|>"
)
"""In the manner of Llama-Guard-3-8B: contents are texts."""

LLAMA_PARTS = LLAMA_TEXT.replace(
    "{{ m['content'] | trim }}",
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] | trim }}{% endfor %}",
)
"""In the manner of Llama-Guard-3-1B: contents are lists of parts."""

QWEN = (
    "<|begin|>Task: say Safety: Categories: Refusal: <BEGIN CONVERSATION> "
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}<END CONVERSATION> <|end|>"
)
"""In the manner of Qwen3Guard."""

CHAT = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
"""Of no guard: the answer is not shown."""


def write_guard(
    folder: Path, template: str, says: dict[str, str], positions: int = 256, pads: bool = True
) -> Path:
    """Save a guard and its tokenizer.

    Args:
        folder: Where to.
        template: Its chat template.
        says: What it says, by the word that is in the conversation; the word `""` leads to it anyway. Of
            several, the later ones win.
        positions: Tokens it can read.
        pads: Whether the tokenizer has a token to pad with.
    """
    ensure_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    words = ["<unk>", *[word for word in says if word], *dict.fromkeys(says.values())]
    tokenizer = _tokenizer(words, list(says.values()), template, pads)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=37,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=positions,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    _script(model, tokenizer, says)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(words: list[str], said: list[str], template: str, pads: bool) -> Any:
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_tokens([AddedToken(text, normalized=False) for text in dict.fromkeys(said)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<|stop|>",
        pad_token="<|pad|>" if pads else None,
        additional_special_tokens=["<|begin|>", "<|end|>"],
    )
    begin = tokenizer.convert_tokens_to_ids("<|begin|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    tokenizer.chat_template = template
    return tokenizer


@torch.no_grad()
def _script(model: Any, tokenizer: Any, says: dict[str, str]) -> None:
    ids = tokenizer.convert_tokens_to_ids
    assert len(tokenizer) + len(says) < HIDDEN
    for parameter in model.parameters():
        parameter.zero_()
    layer = model.model.layers[0]
    for norm in (layer.input_layernorm, layer.post_attention_layernorm, model.model.norm):
        norm.weight.fill_(1.0)
    model.model.embed_tokens.weight.copy_(torch.eye(HIDDEN)[: len(tokenizer)])
    layer.self_attn.v_proj.weight.copy_(torch.eye(HIDDEN))
    for number, (word, text) in enumerate(says.items()):
        mark = HIDDEN - 1 - number
        source = ids("<|end|>") if not word else ids(word)
        layer.self_attn.o_proj.weight[mark, source] = 1.0
        model.lm_head.weight[ids(text), mark] = max(
            float(model.lm_head.weight[ids(text), mark]), 10.0**number
        )
        model.lm_head.weight[tokenizer.eos_token_id, ids(text)] = 1e6
    mark, unknown = HIDDEN - 1 - len(says), tokenizer.unk_token_id
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    layer.self_attn.o_proj.weight[mark, pad] = 1.0
    model.lm_head.weight[unknown, [mark, pad, unknown]] = 1e8
