"""Train tiny-chat from nothing: `python -m examples.tiny_chat_training.train examples/tiny-chat`.

The seed fixes the conversations, their order and the first weights. A conversation goes on until its row is full,
so no step holds padding; only the assistant's words are learnt.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import Qwen3Config, Qwen3ForCausalLM

from examples.tiny_chat_training.generate import Split, conversation
from examples.tiny_chat_training.tokens import (
    CONTEXT_TOKENS,
    END,
    IDS,
    IGNORED,
    PAD,
    build_tokenizer,
    encode_conversation,
)


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train."""

    steps: int = 2400
    step_tokens: int = 4096
    """Tokens of a step; its conversations are all of one length, so a long one comes with fewer beside it."""
    row_tokens: tuple[int, ...] = (128, 256, 512, 2048)
    early_row_shares: tuple[float, ...] = (0.7, 0.2, 0.08, 0.02)
    late_row_shares: tuple[float, ...] = (0.35, 0.45, 0.18, 0.02)
    """The later half has longer rows, where a told fact is further away when it is asked for."""
    matrix_rate: float = 4e-3
    other_rate: float = 3e-3
    warmup_steps: int = 50
    seed: int = 1


def build_model() -> Qwen3ForCausalLM:
    """Return the untrained model."""
    config = Qwen3Config(
        vocab_size=len(IDS),
        hidden_size=192,
        num_hidden_layers=4,
        intermediate_size=512,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=IDS[END],
        pad_token_id=IDS[PAD],
    )
    model = Qwen3ForCausalLM(config)
    model.set_attn_implementation("eager")  # on a CPU, faster than fused attention for rows this short
    return model


def batches(tokenizer: Tokenizer, plan: Plan) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield for each step the tokens and the labels of the next tokens, both (rows, row tokens)."""
    rng = Random(plan.seed)
    for step in range(plan.steps):
        progress = step / plan.steps
        shares = plan.early_row_shares if progress < 0.5 else plan.late_row_shares
        width = rng.choices(plan.row_tokens, shares)[0]
        rows = [
            encode_conversation(tokenizer, conversation(rng, Split.TRAIN, progress, width))
            for _ in range(plan.step_tokens // width)
        ]
        tokens = torch.tensor([row[:width] for row, _ in rows])
        labels = torch.tensor([row[:width] for _, row in rows])
        yield tokens[:, :-1], labels[:, 1:]


def optimizers(model: torch.nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    return [
        torch.optim.Muon(matrices, lr=plan.matrix_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=plan.other_rate, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def rate_at(step: int, plan: Plan) -> float:
    """Return the share of the full learning rate: up in the warm-up, level, then down over the last half."""
    return min((step + 1) / plan.warmup_steps, 1.0, (plan.steps - step) / (0.5 * plan.steps))


def loss_of(model: Qwen3ForCausalLM, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the labelled tokens, in nats."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        learnt = labels != IGNORED
        logits = model.lm_head(hidden[learnt])  # (labelled tokens, vocab)
    return functional.cross_entropy(logits.float(), labels[learnt])


def train(plan: Plan) -> Qwen3ForCausalLM:
    """Return the trained model."""
    torch.manual_seed(plan.seed)
    model = build_model()
    teachers = optimizers(model, plan)
    full_rates = [teacher.param_groups[0]["lr"] for teacher in teachers]
    begun, seen_tokens = time.monotonic(), 0
    for step, (tokens, labels) in enumerate(batches(build_tokenizer().backend_tokenizer, plan)):
        for teacher, full_rate in zip(teachers, full_rates, strict=True):
            teacher.param_groups[0]["lr"] = full_rate * rate_at(step, plan)
        loss = learn(model, teachers, tokens, labels)
        seen_tokens += tokens.numel()
        if step % 50 == 0:
            seconds = time.monotonic() - begun
            print(f"step {step}: loss {loss:.4f}, {seen_tokens} tokens in {seconds:.0f} s", flush=True)
    return model


def learn(
    model: Qwen3ForCausalLM, teachers: list[torch.optim.Optimizer], tokens: torch.Tensor, labels: torch.Tensor
) -> float:
    """Take one step and return the loss before it, in nats a token."""
    loss = loss_of(model, tokens, labels)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for teacher in teachers:
        teacher.step()
        teacher.zero_grad()
    return loss.item()


def save(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Write model and tokenizer as a folder that `AutoModelForCausalLM` loads, weights in bfloat16."""
    model.bfloat16().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description="Train tiny-chat from nothing.")
    parser.add_argument("output", type=Path, help="the folder to write")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    save(train(Plan(steps=chosen.steps, seed=chosen.seed)), chosen.output)


if __name__ == "__main__":
    main()
