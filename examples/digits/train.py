"""Trains the checkpoint that ships in qvl_model/assets/digits: a small Qwen3-VL that answers questions about handwriting.

    python examples/digits/train.py                      # the shipped one; about half an hour on two cores
    python examples/digits/train.py --out DIR --steps 3  # a smoke test

Each step draws new scenes (`scenes.py`) from training scans and asks several questions about each, as the turns of one
conversation; the loss is the cross-entropy of the answers. With a weight that starts at 1 and decays to 0.05, a linear head on
the vision features also names the digit and the colour under every visual token: that teaches the encoder to see long before
the answers could. The head is thrown away.

All randomness comes from --seed: step n draws from the generator (seed, n), whatever the number of workers.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scenes import COLOURS, KINDS, SIDE, WORDINGS, Question, Scene, ask, draw_scene, load_scans, split_scans
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from qvl_model import Qwen3VL, Qwen3VLConfig
from qvl_model.preprocess import ImagePreprocessor, PatchConfig
from qvl_model.processor import Processor
from qvl_model.tokenizer import Tokenizer
from qvl_model.weights import save_pretrained

ASSETS = Path(__file__).resolve().parents[2] / "qvl_model" / "assets" / "digits"
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
PATCH, MERGE = 8, 2
IGNORED = -100


def build_processor() -> Processor:
    """A byte-level BPE over the task's words, so that any text can be asked, and patches of 8 x 8 pixels."""
    words = [
        w.format(c=c, v=v, n=n, s=s)
        for kind in KINDS
        for w in WORDINGS[kind]
        for c in ("colour", "color")
        for v in "0123456789"
        for n in COLOURS
        for s in ("left", "right")
    ]
    words += ["user\n", "assistant\n", "system\n", "yes", "no", "1 2 3 4"] * 500
    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(tokenizers_pattern(), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=448, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(words, trainer)
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"}
    pixels = SIDE * SIDE
    images = ImagePreprocessor(PatchConfig(patch_size=PATCH, merge_size=MERGE, min_pixels=pixels, max_pixels=pixels))
    return Processor(Tokenizer(backend, config), images)


def tokenizers_pattern():
    """Single digits, words with the space before them, runs of other signs, and runs of white space."""
    from tokenizers import Regex

    return Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+")


def build_config(processor: Processor) -> Qwen3VLConfig:
    """`Qwen3VLConfig.digits()` with this tokenizer's size and ids."""
    tokenizer = processor.tokenizer
    config = Qwen3VLConfig.digits(len(tokenizer))
    return replace(
        config,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id,
        vision_end_token_id=tokenizer.vision_end_token_id,
    )


class Scenes(Dataset):
    """Batch n: pixel values, token ids, labels, and the digit and colour under every visual token."""

    def __init__(self, processor: Processor, batch: int, turns: int, steps: int, seed: int) -> None:
        self.processor, self.batch, self.turns, self.steps, self.seed = processor, batch, turns, steps, seed
        self.scans = load_scans()
        self.pool = split_scans(self.scans.labels)[0]
        self.tokens = (SIDE // (PATCH * MERGE)) ** 2

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, step])
        scenes = [draw_scene(rng, self.scans, self.pool, 1 + i % 4) for i in range(self.batch)]
        pixels, grids = self.processor.image_preprocessor([scene.image for scene in scenes])
        rows = [self._conversation(choose_questions(rng, scene, self.turns)) for scene in scenes]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.full((self.batch, longest), self.processor.pad_token_id)
        labels = torch.full((self.batch, longest), IGNORED)
        for row, (tokens, targets) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, : len(targets)] = torch.tensor(targets)
        digits, colours = zip(*(under_tokens(scene) for scene in scenes))
        return {
            "pixel_values": pixels,
            "image_grid_thw": grids,
            "input_ids": ids,
            "attention_mask": (ids != self.processor.pad_token_id).long(),
            "labels": labels,
            "digits": torch.from_numpy(np.concatenate(digits)),
            "colours": torch.from_numpy(np.concatenate(colours)),
        }

    def _conversation(self, questions: list[Question]) -> tuple[list[int], list[int]]:
        """Token ids, and the same with everything but the answers ignored."""
        encode = self.processor.tokenizer.encode
        ids: list[int] = []
        labels: list[int] = []
        for number, question in enumerate(questions):
            image = "<|vision_start|>" + "<|image_pad|>" * self.tokens + "<|vision_end|>" if number == 0 else ""
            asked = encode(f"<|im_start|>user\n{image}{question.text}<|im_end|>\n<|im_start|>assistant\n")
            answered = encode(f"{question.answer}<|im_end|>")
            newline = encode("\n")
            ids += asked + answered + newline
            labels += [IGNORED] * len(asked) + answered + [IGNORED] * len(newline)
        return ids, labels


def choose_questions(rng: np.random.Generator, scene: Scene, turns: int) -> list[Question]:
    """Different kinds in random order; one that gives the others away ("read") comes last but for one time in three."""
    kinds = [str(kind) for kind in rng.permutation(KINDS)]
    if "read" in kinds[:turns] and rng.random() < 2 / 3:
        kinds = [kind for kind in kinds[:turns] if kind != "read"] + ["read"]
    questions = [ask(rng, scene, kind) for kind in kinds]
    return [question for question in questions if question is not None][:turns]


def under_tokens(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """For every merged token the value and the colour of the digit whose box covers its centre; 10 and 8 where none does."""
    cell = PATCH * MERGE
    centres = (np.arange(SIDE // cell) + 0.5) * cell
    rows, columns = np.meshgrid(centres, centres, indexing="ij")
    digits = np.full(rows.shape, 10, np.int64)
    colours = np.full(rows.shape, len(COLOURS), np.int64)
    for digit in scene.digits:
        covered = (abs(rows - digit.y) < digit.height / 2) & (abs(columns - digit.x) < 0.45 * digit.height)
        digits[covered] = digit.value
        colours[covered] = list(COLOURS).index(digit.colour)
    return digits.ravel(), colours.ravel()


class SeeingHead(nn.Module):
    """Names the digit and the colour under every visual token."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.digit = nn.Linear(channels, 11)
        self.colour = nn.Linear(channels, len(COLOURS) + 1)

    def forward(self, features: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.digit(features), batch["digits"]) + F.cross_entropy(
            self.colour(features), batch["colours"]
        )


def losses(model: Qwen3VL, head: SeeingHead, batch: dict[str, Tensor], answering: bool) -> tuple[Tensor, Tensor]:
    """The head's loss, and the cross-entropy of the answers' tokens (zero while the encoder learns alone)."""
    if not answering:
        features, _ = model.model.visual(batch["pixel_values"], batch["image_grid_thw"])
        return head(features, batch), torch.zeros(())
    names = ("pixel_values", "image_grid_thw", "input_ids", "attention_mask")
    inputs = model.embed_inputs(**{name: batch[name] for name in names})
    seeing = head(inputs.embeds[batch["input_ids"] == model.config.image_token_id], batch)
    targets = batch["labels"][:, 1:]
    chosen = targets != IGNORED
    hidden = model.hidden_states(inputs)[:, :-1]
    return seeing, F.cross_entropy(model.lm_head(hidden[chosen]), targets[chosen])


def train(options: argparse.Namespace) -> Qwen3VL:
    torch.manual_seed(options.seed)
    processor = build_processor()
    model = Qwen3VL(build_config(processor)).train()
    head = SeeingHead(model.config.text.hidden_size)
    parameters = [*model.parameters(), *head.parameters()]
    matrices, vectors = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=options.lr,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, total_steps=options.steps, pct_start=0.05, final_div_factor=100
    )
    scenes = Scenes(processor, options.batch, options.turns, options.steps, options.seed)
    loader = DataLoader(
        scenes, batch_size=None, num_workers=options.workers, prefetch_factor=4 if options.workers else None
    )
    looking = int(options.looking * options.steps)
    start = time.time()
    bar = tqdm(loader, total=options.steps, mininterval=5)
    for step, batch in enumerate(bar):
        seeing, answers = losses(model, head, batch, answering=step >= looking)
        loss = answers + seeing * min(1.0, max(0.05, 2 - step / max(looking, 1)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == options.steps - 1:
            bar.write(
                f"step {step} seeing {seeing.item():.3f} answers {answers.item():.3f} {time.time() - start:.0f} s"
            )
    save(model, processor, Path(options.out))
    return model


@torch.no_grad()
def save(model: Qwen3VL, processor: Processor, folder: Path) -> None:
    """The released format, weights in bfloat16: what is on disk is what is evaluated."""
    processor.save_pretrained(folder)
    model = model.eval().to(torch.bfloat16)
    save_pretrained(model, folder)
    generation = {"eos_token_id": processor.eos_token_ids, "pad_token_id": processor.pad_token_id, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ASSETS), help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=48, help="scenes a step")
    parser.add_argument("--turns", type=int, default=3, help="questions about each scene")
    parser.add_argument("--looking", type=float, default=0.25, help="share of the steps that train the encoder alone")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
