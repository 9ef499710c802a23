"""A training script of one's own, written for plain accelerate. It knows nothing of launchkit.

    python examples/train.py                                  one process, as it stands
    launchkit launch examples/train.py --plan plan.json       the same file under DDP, FSDP2 or ZeRO

Without ``--model`` it trains a small Llama with random weights, so that nothing is downloaded.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoModelForCausalLM, LlamaConfig


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a model directory or hub id; a small random Llama without it")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    return parser.parse_args()


def build_model(name: str | None) -> torch.nn.Module:
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    return AutoModelForCausalLM.from_config(config)


def main() -> None:
    arguments = parse_arguments()
    set_seed(0)
    accelerator = Accelerator()
    model = build_model(arguments.model)
    num_batches = arguments.steps * accelerator.gradient_accumulation_steps
    num_sequences = num_batches * arguments.micro_batch * accelerator.num_processes
    tokens = torch.randint(0, 4096, (num_sequences, arguments.seq_len))
    loader = torch.utils.data.DataLoader(tokens, batch_size=arguments.micro_batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, foreach=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    model.train()
    for number, batch in enumerate(loader, start=1):
        with accelerator.accumulate(model):
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"batch {number}: loss {loss.item():.4f}")
    accelerator.print(f"done: {accelerator.distributed_type}, {accelerator.num_processes} processes")
    accelerator.end_training()


if __name__ == "__main__":
    main()
