"""A training loop of one's own, two exports, and the same numbers out of each file's consumer.

    python examples/export_and_check.py [--fast] [--out runs/examples/export_and_check]

No trainer: `qat.prepare`, `qat.after_optimizer_step`, `qat.export`. One grid, 4 bits in groups of 32 with portable
scales, goes bit for bit into GGUF Q4_0 (read by llama.cpp) and into compressed-tensors (read by transformers).
"""

import argparse
import inspect
import textwrap
from pathlib import Path

import qat
import torch
from qat.export.llama_cpp import LlamaCpp
from qat.recipes import from_dict
from qat.tasks.stdlib import token_blocks, train_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

RECIPE = from_dict(
    {
        "name": "both_formats",
        "rules": {
            "linears": {
                "types": ["Linear"],
                "weight": {"bits": 4, "granularity": "group", "group_size": 32, "quantizer": "lsq"},
            },
            "table": {"match": ["*embed_tokens", "*lm_head"], "keep_float": True},
        },
        "export": {"targets": ["gguf", "compressed-tensors"]},
    }
)


def make(vocabulary: int) -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, blocks: torch.Tensor, steps: int) -> None:
    """Plain PyTorch; the one line for quantization is the last of the loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    order = torch.Generator().manual_seed(0)
    for step in range(steps):
        batch = blocks[torch.randint(len(blocks), (8,), generator=order)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        qat.after_optimizer_step(model)
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {loss.item():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fast", action="store_true", help="30 steps only")
    parser.add_argument("--out", type=Path, default=Path("runs/examples/export_and_check"))
    options = parser.parse_args()

    text = inspect.getsource(argparse) + inspect.getsource(textwrap)
    tokenizer = train_tokenizer([text], 384)
    blocks = token_blocks(tokenizer, [text], 64)
    model = make(len(tokenizer))
    plan = qat.prepare(model, RECIPE)
    print(f"{plan.coverage:.1f} % of the parameters on a 4-bit grid")
    train(model.train(), blocks, 30 if options.fast else 300)

    model.eval()
    prompt = blocks[0][:32]
    with torch.no_grad():
        trained = model(prompt[None]).logits[0].log_softmax(-1)
    for name in RECIPE.export.targets:
        folder = options.out / name
        receipt = qat.export(model, folder, format=name, tokenizer=tokenizer, overwrite=True)
        rows = qat.verify(folder)
        worst, reader = max(row.max_abs_diff for row in rows), rows[0].reader
        print(f"{name}: {receipt.bytes:,} bytes; {len(rows)} tensors read by {reader}: largest difference {worst:g}")
        if name == "gguf":
            with LlamaCpp(folder / "model.gguf") as served:
                read = served.logits(prompt).log_softmax(-1)
                print("  llama.cpp goes on:", repr(tokenizer.decode(served.generate(prompt.tolist(), 12))))
        else:
            served = AutoModelForCausalLM.from_pretrained(folder).eval()
            with torch.no_grad():
                read = served(prompt[None]).logits[0].float().log_softmax(-1)
        # the weights are the same; what is left is the consumer's own arithmetic (llama.cpp: 8-bit activations)
        kl = (trained.exp() * (trained - read)).sum(-1).mean().item()
        print(f"  KL(trained || served) = {kl:.2e} per token")


if __name__ == "__main__":
    main()
