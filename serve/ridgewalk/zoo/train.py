"""Trains the zoo's models from nothing: `python -m ridgewalk.zoo.train --out DIR [--name demo-dense]`.

Deterministic in the seed (on one kind of machine): initial weights, problems and batches all follow from it, and the
length is a number of steps, not a time. An interrupted run continues from `DIR/training.pt` and sees the
batches it would have seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ridgewalk.zoo.data import Batch, block_batches, corpus
from ridgewalk.zoo.evaluate import evaluate
from ridgewalk.zoo.experts import LoadMeter, balance, routers_of
from ridgewalk.zoo.sharpness import SharpnessMeter, clip
from ridgewalk.zoo.tokenizer import END_OF_TEXT, TURN_END, save_tokenizer, train_tokenizer

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

BLOCK = 64  # steps whose batches are generated at a time
WORKERS = 2  # threads that each compute the gradient of one batch per step
CHECKPOINT_EVERY = 250
ROUTER_RATE = 0.2  # of the learning rate: a whole row of a router's weights moves at once
REPORT_SEED = 2026


@dataclass(frozen=True)
class Recipe:
    """All that decides a model: its architecture, its tokenizer's size and its training."""

    model_type: str  # a transformers model type
    config: dict[str, Any]  # arguments of that type's config
    vocab_size: int = 640
    steps: int = 4500
    bias_speed: float = 0.0  # of the routers' load balancing, per step; falls with the learning rate
    sharpness: float = math.inf  # bound of the attention's logits (MLA only)
    batch_tokens: int = 1024  # of each worker's batch
    learning_rate: float = 5e-3
    warmup: int = 150
    weight_decay: float = 0.01
    seed: int = 0
    rope_theta: float = 10000.0
    max_length: int = 2048


RECIPES = {
    # 3.3 M parameters. Heads and KV heads divide by 4, so that it can be served with tensor parallelism 2 and 4.
    "demo-dense": Recipe(
        model_type="qwen3",
        config={
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "tie_word_embeddings": True,
        },
    ),
    # 4.3 M parameters: MLA in four layers, of which the last three are sparse. Its attention has no norms of queries
    # and keys as Qwen3's has: matrices start with unit gain, for from less it would start out nearly uniform, and
    # `sharpness` stops its growth. The scaling factor makes each chosen expert weigh as much as the shared one.
    "demo-moe": Recipe(
        model_type="deepseek_v3",
        config={
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "q_lora_rank": 160,
            "kv_lora_rank": 128,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 96,
            "routed_scaling_factor": 2.0,
            "num_mtp_layers": 0,
            "initializer_range": 0.06,
            "tie_word_embeddings": True,
        },
        steps=6000,
        bias_speed=2e-3,
        sharpness=24.0,
    ),
}


def build_model(recipe: Recipe, tokenizer: Tokenizer) -> PreTrainedModel:
    """A freshly initialized float32 model; the caller seeds torch."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        recipe.model_type,
        vocab_size=recipe.vocab_size,
        max_position_embeddings=recipe.max_length,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(TURN_END),
        pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
        **recipe.config,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def learning_rate_at(recipe: Recipe, step: int) -> float:
    """Linear warmup, then a cosine to a hundredth of the peak."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def batch_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the output tokens. Rows are padded on the right, so causal attention needs no mask."""
    import torch
    import torch.nn.functional as F

    ids, labels = torch.tensor(batch.ids), torch.tensor(batch.labels)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False)[0]
        kept = labels != -100
        logits = F.linear(hidden[kept], model.lm_head.weight)
    return F.cross_entropy(logits.float(), labels[kept])


def make_optimizers(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices and the experts' stacks of them; AdamW for embedding, norms and routers.

    On these problems Muon reaches a given loss with about half the tokens that AdamW alone takes.
    """
    import torch

    from ridgewalk.zoo.muon import StackedMuon

    rate, decay = recipe.learning_rate, recipe.weight_decay
    embeddings = {id(p) for module in (model.get_input_embeddings(), model.lm_head) for p in module.parameters()}
    routers = {id(p) for module in routers_of(model) for p in module.parameters()}
    matrices, stacks, routing, others = [], [], [], []
    for p in model.parameters():
        if id(p) in routers:
            routing.append(p)
        elif p.dim() == 3:
            stacks.append(p)
        elif p.dim() == 2 and id(p) not in embeddings:
            matrices.append(p)
        else:
            others.append(p)
    groups = [{"params": others}] + ([{"params": routing, "scale": ROUTER_RATE}] if routing else [])
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    return optimizers + ([StackedMuon(stacks, lr=rate, weight_decay=decay)] if stacks else [])


class Trainer:
    """The loop of the optimizers over a recipe, with its checkpoint in `out/training.pt`."""

    def __init__(self, recipe: Recipe, out: Path) -> None:
        import torch

        self.recipe, self.state_file = recipe, out / "training.pt"
        self.tokenizer = train_tokenizer(corpus(recipe.seed, 6000), recipe.vocab_size)
        if self.tokenizer.get_vocab_size() != recipe.vocab_size:
            raise ValueError(f"the corpus gives {self.tokenizer.get_vocab_size()} tokens, not {recipe.vocab_size}")
        save_tokenizer(self.tokenizer, out, recipe.max_length)
        torch.manual_seed(recipe.seed)
        self.model = build_model(recipe, self.tokenizer)
        self.optimizers = make_optimizers(self.model, recipe)
        self.load_meter, self.sharpness_meter = LoadMeter(self.model), SharpnessMeter(self.model)
        self.step, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        self._marks = time.monotonic(), time.process_time()
        self._block: list[Batch] = []
        # One thread of arithmetic per batch, and for the optimizers. Sharing each operation between the cores means
        # hundreds of barriers a step, and they cost ten times the work as soon as another program wants a core.
        self._workers = ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,))
        if self.state_file.exists():
            self._resume()

    def _resume(self) -> None:
        import torch

        state = torch.load(self.state_file, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.cpu_seconds = state["step"], state["seconds"], state["cpu_seconds"]
        print(f"continuing from step {self.step}", flush=True)

    def save_state(self) -> None:
        import torch

        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
        }
        partial = self.state_file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.state_file)

    def _batches(self) -> list[Batch]:
        """The current step's batches, one for each worker."""
        block, index = divmod(self.step, BLOCK)
        if index == 0 or not self._block:
            pad = self.tokenizer.token_to_id(END_OF_TEXT)
            count, size = BLOCK * WORKERS, self.recipe.batch_tokens
            self._block = block_batches(self.tokenizer, self.recipe.seed, block, count, size, pad)
        return self._block[index * WORKERS : (index + 1) * WORKERS]

    def train_step(self) -> tuple[float, int]:
        """Train on one step's batches; their mean loss and their padded tokens."""
        import torch

        batches, rate = self._batches(), learning_rate_at(self.recipe, self.step)
        for group in (g for optimizer in self.optimizers for g in optimizer.param_groups):
            group["lr"] = rate * group.get("scale", 1.0)
        losses, gradients, loads, bounds = zip(*self._workers.map(self._gradients, batches), strict=True)
        for parameter, *parts in zip(self.model.parameters(), *gradients, strict=True):
            parameter.grad = torch.stack(parts).mean(dim=0)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        list(self._workers.map(lambda optimizer: optimizer.step(), self.optimizers))  # their parameters are disjoint
        self.model.zero_grad(set_to_none=True)
        balance(self.load_meter.routers, sum(loads), self.recipe.bias_speed * rate / self.recipe.learning_rate)
        clip(self.sharpness_meter.attentions, torch.stack(bounds).amax(dim=0), self.recipe.sharpness)
        self.step += 1
        return sum(losses) / WORKERS, sum(len(b.ids) * len(b.ids[0]) for b in batches)

    def _gradients(self, batch: Batch) -> tuple[float, tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
        """Loss, its gradient for each parameter, the load of the experts, and the bounds of the attention's logits."""
        import torch

        loss = batch_loss(self.model, batch)
        real = torch.tensor(batch.ids) != self.model.config.pad_token_id
        loads, bounds = self.load_meter.loads(real), self.sharpness_meter.bounds(real)
        return loss.item(), torch.autograd.grad(loss, list(self.model.parameters())), loads, bounds

    def run(self) -> None:
        """Train to the recipe's last step, printing progress."""
        losses, tokens = [], 0
        self._marks = time.monotonic(), time.process_time()
        self.model.train()
        while self.step < self.recipe.steps:
            loss, count = self.train_step()
            losses.append(loss)
            tokens += count
            if self.step % 50 == 0 or self.step == self.recipe.steps:
                spent = self._count_time()
                mean = sum(losses) / len(losses)
                print(f"step {self.step} loss {mean:.4f} {tokens / spent:.0f} tok/s {self.seconds:.0f} s", flush=True)
                losses, tokens = [], 0
            if self.step % CHECKPOINT_EVERY == 0 or self.step == self.recipe.steps:
                self.save_state()

    def _count_time(self) -> float:
        """Add what passed since the last call, on the clock and on the processors; returns the former's seconds."""
        before, self._marks = self._marks, (time.monotonic(), time.process_time())
        self.seconds += self._marks[0] - before[0]
        self.cpu_seconds += self._marks[1] - before[1]
        return self._marks[0] - before[0]


def save_model(trainer: Trainer, out: Path) -> None:
    """Write the BF16 weights and configs as a standard Hugging Face folder.

    The routers' biases stay float32, as DeepSeek's do: they differ by less than bfloat16 tells apart.
    """
    import torch

    trainer.load_meter.close()
    trainer.sharpness_meter.close()
    for parameter in trainer.model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    trainer.model.config.dtype = torch.bfloat16
    trainer.model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors leaves it readable by its owner only
    config = json.loads((out / "config.json").read_text())
    config["rope_theta"] = trainer.recipe.rope_theta  # where readers older than transformers 5 look for it
    generation = {"do_sample": False, "eos_token_id": config["eos_token_id"], "pad_token_id": config["pad_token_id"]}
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        (out / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def train(name: str, out: Path, steps: int | None = None, problems: int = 1000) -> dict[str, Any]:
    """Train (or continue) `name` into `out`, evaluate it, and write EVAL.json; returns that report."""
    import torch

    recipe = RECIPES[name] if steps is None else dataclasses.replace(RECIPES[name], steps=steps)
    torch.set_num_threads(1)  # see Trainer._workers
    trainer = Trainer(recipe, out)
    size = sum(p.numel() for p in trainer.model.parameters())
    print(f"{name}: {size / 1e6:.2f} M parameters, {recipe.steps} steps", flush=True)
    trainer.run()
    save_model(trainer, out)
    report = evaluate(out, problems, REPORT_SEED)
    report |= {
        "parameters": size,
        "training_seed": recipe.seed,
        "training_steps": recipe.steps,
        "training_seconds": round(trainer.seconds),
        "training_cpu_seconds": round(trainer.cpu_seconds),  # what counts if other programs shared the machine
        "machine_cores": os.cpu_count(),
    }
    (out / "EVAL.json").write_text(json.dumps(report, indent=2) + "\n")
    trainer.state_file.unlink()  # only now: an interrupted evaluation needs no second training
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", choices=sorted(RECIPES), default="demo-dense")
    parser.add_argument("--steps", type=int, help="fewer or more steps than the recipe's")
    parser.add_argument("--problems", type=int, default=1000, help="fresh problems in the final evaluation")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    report = train(args.name, args.out, args.steps, args.problems)
    print(json.dumps({k: v for k, v in report.items() if k != "wrong"}, indent=2))


if __name__ == "__main__":
    main()
