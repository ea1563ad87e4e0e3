"""Train one model on prepared rows, go on from its checkpoint if killed, and measure it."""

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from bwlens.knowledge.backpack.architecture import Backpack, BackpackConfig
from tools.backpack.text import PHRASINGS
from tools.demo.corpus import ANSWER, PHRASE, PROSE

LOSS_WEIGHTS = {PHRASE: 0.3, ANSWER: 3.0, PROSE: 1.0}
"""As for the demo model: names cannot be foretold, answers are the point."""


@dataclass(frozen=True)
class Job:
    """One model to train: all that decides its weights, beside rows and versions."""

    name: str
    seed: int
    senses: dict[str, Any] | None
    """Settings of `BackpackConfig`; None is a Transformer of the same trunk."""
    trunk: dict[str, Any] = field(default_factory=dict)
    longer: int = 1
    """How many times as many steps as the others."""
    keep: bool = False
    """Leave the weights, in half precision, as well as the figures."""
    lr: float = 1.5e-3
    warmup: int = 100

    @property
    def title(self) -> str:
        return f"{self.name}-{self.seed}"


def make_model(job: Job, vocab: int, end: int) -> Any:
    torch.manual_seed(job.seed)
    common = {"vocab_size": vocab, "bos_token_id": end, "eos_token_id": end, **job.trunk}
    common |= {"activation_function": "gelu_pytorch_tanh", "use_cache": False}
    if job.senses is None:
        return GPT2LMHeadModel(GPT2Config(**common))
    return Backpack(BackpackConfig(**common, **job.senses))


def learning_rate(job: Job, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a hundredth."""
    if step < job.warmup:
        return job.lr * (step + 1) / job.warmup
    done = (step - job.warmup) / max(1, steps - job.warmup)
    return job.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(model: Any, cuda: bool) -> torch.optim.Optimizer:
    embeddings = {id(model.get_input_embeddings().weight)}
    decayed = [
        p for n, p in model.named_parameters()
        if p.dim() == 2 and id(p) not in embeddings and "wpe" not in n
    ]  # fmt: skip
    chosen = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    if cuda:  # A step size on the device, so that a recorded step can be replayed.
        lr = torch.zeros((), device="cuda")
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True, capturable=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))


class Training:
    """One job's model and how far it is."""

    def __init__(self, job: Job, folder: Path, vocab: int, end: int, device: str):
        self.job, self.folder, self.device = job, folder, device
        self.cuda = device.startswith("cuda")
        self.model = make_model(job, vocab, end).to(device)
        self.optimizer = make_optimizer(self.model, self.cuda)
        self.ids = torch.from_numpy(np.load(folder / f"ids-{job.seed}.npy")).to(device)
        self.kinds = torch.from_numpy(np.load(folder / f"kinds-{job.seed}.npy")).to(device)
        self.weights = torch.tensor([LOSS_WEIGHTS[k] for k in range(3)], device=device)
        self.step, self.curve = 0, []
        self.model.train()
        self.graph: Any = None
        if self.cuda:
            try:
                self._record()
            except RuntimeError as error:
                print(f"{job.title}: not recorded: {error}", flush=True)
                self.graph = None
                self.model = make_model(job, vocab, end).to(device).train()
                self.optimizer = make_optimizer(self.model, self.cuda)
        else:
            self._resume()

    def _record(self) -> None:
        """One step as a CUDA graph: models so small spend their time on launching kernels."""
        self._ids = self.ids[0].long()
        self._kinds = self.kinds[0].long()
        start = {n: p.detach().clone() for n, p in self.model.state_dict().items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._whole_step()
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._whole_step()
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(start[name])
            for state in self.optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()

    def _whole_step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(self._ids, self._kinds)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    @property
    def _checkpoint(self) -> Path:
        return self.folder / f"{self.job.title}.pt"

    def _resume(self) -> None:
        if not self._checkpoint.exists():
            return
        state = torch.load(self._checkpoint, weights_only=False, map_location=self.device)
        if state["job"] != asdict(self.job):
            raise ValueError(
                f"{self._checkpoint} was made with other settings, {state['job']}: "
                "start with those, or in another folder"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.curve = state["step"], state["curve"]

    def save_checkpoint(self) -> None:
        unfinished = self._checkpoint.with_suffix(".tmp")
        state = {"job": asdict(self.job), "step": self.step, "curve": self.curve}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, unfinished)
        os.replace(unfinished, self._checkpoint)

    def autocast(self) -> Any:
        if not self.cuda:
            return nullcontext()
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)

    def backward(self, ids: torch.Tensor, kinds: torch.Tensor) -> None:
        """Gradients of the weighted loss on one step's rows."""
        weights = self.weights[kinds[:, 1:]].flatten()
        with self.autocast():
            logits = self.model(input_ids=ids).logits[:, :-1]
        losses = cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        ((losses * weights).sum() / weights.sum()).backward()

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def advance(self, steps: int) -> None:
        """One step of `steps`; dropout depends on seed and step alone."""
        if self.step % 50 == 0:
            torch.manual_seed(self.job.seed * 1_000_003 + self.step)
        rate = learning_rate(self.job, self.step, steps)
        for group in self.optimizer.param_groups:
            if self.cuda:
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        ids, kinds = self.ids[self.step], self.kinds[self.step]
        if self.graph is None:
            self._ids, self._kinds = ids.long(), kinds.long()
            self._whole_step()
        else:
            self._ids.copy_(ids)
            self._kinds.copy_(kinds)
            self.graph.replay()
        self.step += 1

    def run(
        self, steps: int, deadline: float, report: Callable[[str], None], bar: bool = False
    ) -> dict[str, Any]:
        """To the end, or to the deadline (`time.time`); the figures."""
        saved = time.time()
        marks = {round(steps * part / 8) for part in range(1, 8)}
        for _ in tqdm(range(self.step, steps), self.job.title, disable=not bar, mininterval=1):
            if time.time() >= deadline:
                break
            self.advance(steps)
            if self.step in marks:
                self.curve.append([self.step, self.perplexity()])
                report(f"step {self.step}/{steps}: perplexity {self.curve[-1][1]:.1f}")
            if not self.cuda and time.time() - saved > 60:
                self.save_checkpoint()
                saved = time.time()
        self.curve.append([self.step, self.perplexity()])
        figures = {"perplexity": self.curve[-1][1], **self.facts()}
        if self.job.keep:
            self.save_model()
        row = {"arm": self.job.name, "seed": self.job.seed, "steps": self.step, "of": steps}
        row |= {"tokens": self.step * self.ids[0].numel(), "parameters": self.n_parameters}
        return row | figures

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def save_model(self) -> Path:
        path = self.folder / f"{self.job.title}.safetensors"
        state = {n: p.detach().half().cpu().contiguous() for n, p in self.model.named_parameters()}
        config = self.model.config.to_dict() | {"activation_function": "gelu_new"}
        save_file(state, path, metadata={"format": "pt", "config": json.dumps(config)})
        return path

    @torch.no_grad()
    def perplexity(self) -> float:
        """Per token of the held-out prose, in windows that begin with the end-of-text token."""
        questions = np.load(self.folder / "questions.npz")
        windows = torch.from_numpy(questions["windows"]).to(self.device).long()
        lengths = torch.from_numpy(questions["window_lengths"]).to(self.device)
        self.model.eval()
        nll = count = 0.0
        for ids, length in zip(windows.split(64), lengths.split(64), strict=True):
            logits = self.model(input_ids=ids).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            inside = torch.arange(1, ids.shape[1], device=self.device) < length[:, None]
            nll += (loss.view(inside.shape) * inside).sum().item()
            count += inside.sum().item()
        self.model.train()
        return math.exp(nll / count)

    @torch.no_grad()
    def facts(self) -> dict[str, float]:
        """Percent of prompts answered right by phrasing, and of facts known: all trained ones."""
        questions = np.load(self.folder / "questions.npz")
        prompts, lengths = questions["prompts"], questions["lengths"]
        self.model.eval()
        said = np.zeros(len(prompts), np.int64)
        order = np.argsort(lengths, kind="stable")
        for begin in range(0, len(order), 512):
            chosen = order[begin : begin + 512]
            # Padding on the right changes nothing to its left.
            ids = torch.from_numpy(prompts[chosen, : lengths[chosen].max()]).to(self.device).long()
            last = torch.from_numpy(lengths[chosen] - 1).to(self.device)
            base = getattr(self.model, self.model.base_model_prefix)(input_ids=ids)
            hidden = base if isinstance(base, torch.Tensor) else base.last_hidden_state
            logits = self.model.lm_head(hidden[torch.arange(len(chosen)), last])
            said[chosen] = logits.argmax(-1).cpu().numpy()
        self.model.train()
        right = said == questions["answers"]
        shares = {
            name: 100 * right[questions["phrasings"] == p].mean()
            for p, name in enumerate(PHRASINGS)
        }
        trained = questions["phrasings"] == 0
        n_facts = questions["facts"].max() + 1
        wrong = np.bincount(questions["facts"][trained], ~right[trained], minlength=n_facts)
        return {name: float(share) for name, share in shares.items()} | {
            "known": float(100 * (wrong == 0).mean())
        }
