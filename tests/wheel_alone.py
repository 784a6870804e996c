"""Run where only the daco wheel is installed: load the release folder given, steer a tiny model with it."""

import sys
from importlib.metadata import distributions
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import daco


def main(release: Path) -> None:
    sae = daco.SteeringSAE.from_pretrained(release)
    facts = sae.base_model
    config = LlamaConfig(
        hidden_size=facts.hidden_size,
        intermediate_size=37,
        num_hidden_layers=facts.n_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=99,
    )
    config.model_type = facts.model_type  # the release was made for another class of the same shape
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    tokens = torch.arange(1, 13)[None]
    with torch.no_grad():
        before = model(tokens).logits
        with sae.steer(model, gamma=1.0, eta=-1.0, base_model_ok=True) as run:
            steered = model(tokens).logits
        after = model(tokens).logits
    assert torch.equal(before, after), "steering left something behind"
    assert not torch.equal(before, steered), "steering did nothing"
    print(run.report())
    names = {dist.metadata["Name"].lower() for dist in distributions()}
    assert not names & {"datasets", "jinja2-time", "ray", "nltk", "starlette"}, names


if __name__ == "__main__":
    main(Path(sys.argv[1]))
