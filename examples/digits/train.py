"""Trains the checkpoint of qvl_model/assets/digits: a small Qwen3-VL that answers questions about handwriting.

    python examples/digits/train.py                                       # README.md has the wall time
    python examples/digits/train.py --out DIR --small 1 --looking 1 --asking 1   # a smoke test

Three stages. The vision encoder learns alone, first on small pictures of one digit, then on scenes: linear heads name
the digit, the colour and the places under every visual token and draw the ink of every patch. Then the whole model
learns, on scenes with several questions each, asked as the turns of one conversation; the loss is the cross-entropy of
the answers' tokens, and the heads' loss, whose weight fades. The heads are thrown away. Without the first two stages
the encoder sits for a long time on a plateau where it knows every colour and no digit, at three times the cost a step.

What is asked depends on what is known: every 100 steps the model answers questions about new scenes of training scans,
and a kind is then asked in proportion to its share of wrong answers. The kinds are learnt one after the other, each in
its time; a fixed mixture spends most of it on what is known already.

All randomness comes from --seed: step n draws from the generator (seed, n), whatever the number of workers.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scenes import (
    COLOURS,
    EXERCISES,
    KINDS,
    SIDE,
    WORDINGS,
    Question,
    Scene,
    ask,
    draw_scene,
    load_scans,
    split_scans,
)
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from qvl_model import Qwen3VL, Qwen3VLConfig
from qvl_model.layers import GeluMLP, LayerNorm, SwiGLU
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
# Single digits, words with the space before them, runs of other signs, and runs of white space.
WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
PATCH, MERGE = 12, 2
SMALL = (2 * PATCH * MERGE, 2 * PATCH * MERGE)
# What photographs of common shapes become when they are resized to SIDE * SIDE pixels.
SIZES = ((SIDE, SIDE), (72, 96), (96, 72), (72, 120), (120, 72))
NOTHING = (10, len(COLOURS), 4, 4)  # what the heads call the background
IGNORED = -100
ASKED = (*KINDS, *EXERCISES)
AHEAD = 20  # steps before its round in which a mixture is decided; workers draw fewer than this ahead
TEXT_BLOCK = 16  # sequences are padded to a multiple, so that there are few shapes to compile for


def build_processor() -> Processor:
    """A byte-level BPE over the task's words, so that any text can be asked, and patches of 12 x 12 pixels."""
    words = [
        wording.format(c=c, v=v, n=n, s=s)
        for kind in KINDS
        for wording in WORDINGS[kind]
        for c in ("colour", "color")
        for v in "0123456789"
        for n in COLOURS
        for s in ("left", "right")
    ]
    words += ["user\n", "assistant\n", "system\n", "yes", "no", "1 2 3 4", *COLOURS] * 500
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(words, trainer)
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"}
    areas = [height * width for height, width in SIZES]
    images = ImagePreprocessor(
        PatchConfig(patch_size=PATCH, merge_size=MERGE, min_pixels=min(areas), max_pixels=max(areas))
    )
    return Processor(Tokenizer(backend, config), images)


def build_config(processor: Processor) -> Qwen3VLConfig:
    """`Qwen3VLConfig.digits()` with this tokenizer's size and ids."""
    tokenizer = processor.tokenizer
    return replace(
        Qwen3VLConfig.digits(len(tokenizer)),
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id,
        vision_end_token_id=tokenizer.vision_end_token_id,
    )


@torch.no_grad()
def initialise(model: Qwen3VL) -> None:
    """Matrices keep the variance of what they multiply (std 1 / sqrt(fan-in)).

    The customary 0.02 is that of a width of 2500; here it leaves every block's contribution too small to learn from.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "pos_embed" not in name:
            parameter.normal_(std=1 / math.sqrt(parameter[0].numel()))


class Scenes(Dataset):
    """Batch n: pixels, what the heads should see, and from the third stage on token ids and labels.

    `pool` are the indices of the scans to draw from, `stages` the steps at which the second and third stage begin.
    `mixture[round]` has the weight of every kind of ASKED in a round of the third stage, in memory shared with the
    workers; whoever trains fills it as rounds come near.
    """

    def __init__(
        self, processor: Processor, pool: np.ndarray, options: argparse.Namespace, stages: tuple[int, int]
    ) -> None:
        self.processor, self.pool, self.options, self.stages = processor, pool, options, stages
        self.mixture = torch.ones(2 + options.asking // options.round, len(ASKED)).share_memory_()
        self.scans = load_scans()
        # The shipped preprocessor would enlarge small pictures; scenes it leaves as they are.
        smallest = SMALL[0] * SMALL[1]
        self.images = ImagePreprocessor(replace(processor.image_preprocessor.config, min_pixels=smallest))

    def __len__(self) -> int:
        return self.options.small + self.options.looking + self.options.asking

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.options.seed, step])
        if step < self.stages[0]:
            # Four small pictures are as many patches as one scene.
            scenes = [draw_scene(rng, self.scans, self.pool, 1, SMALL) for _ in range(4 * self.options.batch)]
            return self._seen(scenes)
        size = SIZES[0] if rng.random() < 0.6 else SIZES[rng.integers(1, len(SIZES))]
        most = 4 if size[1] >= SIDE else 3
        scenes = [draw_scene(rng, self.scans, self.pool, 1 + i % most, size) for i in range(self.options.batch)]
        seen = self._seen(scenes)
        if step < self.stages[1]:
            return seen
        weights = self.mixture[(step - self.stages[1]) // self.options.round].numpy().astype(float)
        questions = [choose_questions(rng, scene, self.options.turns, weights) for scene in scenes]
        return seen | self._asked(scenes, questions)

    def exam(self, number: int, count: int) -> tuple[dict[str, Tensor], list[str]]:
        """`count` scenes of one question each, the kinds in turn, and the kinds. Exams are numbered from 1."""
        rng = np.random.default_rng([self.options.seed, 0, number])
        scenes = [draw_scene(rng, self.scans, self.pool, 1 + i // len(ASKED) % 4) for i in range(count)]
        questions = []
        for i, scene in enumerate(scenes):
            kinds = ASKED[i % len(ASKED) :] + ASKED
            questions.append(next(q for q in (ask(rng, scene, kind) for kind in kinds) if q is not None))
        batch = self._seen(scenes) | self._asked(scenes, [[question] for question in questions])
        return batch, [question.kind for question in questions]

    def _seen(self, scenes: list[Scene]) -> dict[str, Tensor]:
        pixels, grids = self.images([scene.image for scene in scenes])
        seen, ink = (np.concatenate(parts) for parts in zip(*(targets(scene) for scene in scenes)))
        return {
            "pixel_values": pixels,
            "image_grid_thw": grids,
            "seen": torch.from_numpy(seen),
            "ink": torch.from_numpy(ink),
        }

    def _asked(self, scenes: list[Scene], questions: list[list[Question]]) -> dict[str, Tensor]:
        height, width = scenes[0].image.shape[:2]
        tokens = height * width // (PATCH * MERGE) ** 2
        rows = [self._conversation(of_scene, tokens) for of_scene in questions]
        longest = max(len(ids) for ids, _ in rows)
        shape = (len(rows), -(-longest // TEXT_BLOCK) * TEXT_BLOCK)
        ids, labels = torch.full(shape, self.processor.pad_token_id), torch.full(shape, IGNORED)
        for row, (known, answers) in enumerate(rows):
            ids[row, : len(known)] = torch.tensor(known)
            labels[row, : len(answers)] = torch.tensor(answers)
        return {"input_ids": ids, "labels": labels, "attention_mask": (ids != self.processor.pad_token_id).long()}

    def _conversation(self, questions: list[Question], tokens: int) -> tuple[list[int], list[int]]:
        """Token ids, and the same with everything but the answers ignored."""
        encode = self.processor.tokenizer.encode
        ids: list[int] = []
        labels: list[int] = []
        for number, question in enumerate(questions):
            image = "<|vision_start|>" + "<|image_pad|>" * tokens + "<|vision_end|>" if number == 0 else ""
            asked = encode(f"<|im_start|>user\n{image}{question.text}<|im_end|>\n<|im_start|>assistant\n")
            answered = encode(f"{question.answer}<|im_end|>")
            newline = encode("\n")
            ids += asked + answered + newline
            labels += [IGNORED] * len(asked) + answered + [IGNORED] * len(newline)
        return ids, labels


def choose_questions(rng: np.random.Generator, scene: Scene, turns: int, weights: np.ndarray) -> list[Question]:
    """Up to `turns` different questions, their kinds drawn by `weights` over ASKED.

    One that gives the others away ("read") comes last but for one time in three.
    """
    questions: dict[str, Question] = {}
    for kind in rng.choice(ASKED, 4 * turns, p=weights / weights.sum()):
        question = ask(rng, scene, str(kind))
        read = any(asked.kind == "read" for asked in questions.values())
        if question is not None and len(questions) < turns and not (read and kind == "read"):
            questions.setdefault(question.text, question)
    ordered = list(questions.values()) or [ask(rng, scene, "count")]
    if rng.random() < 2 / 3:
        ordered.sort(key=lambda question: question.kind == "read")
    return [question for question in ordered if question is not None]


def targets(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """What the heads should see.

    (tokens, 4): the value, the colour, the place from the left and the place by height of the digit at every token's
    centre; 10, 8, 4 and 4 where there is none. And the ink of every patch, (patches, PATCH * PATCH). Both in the order
    of the pixel values.
    """
    height, width = scene.ink.shape
    cell = PATCH * MERGE
    rows, columns = np.meshgrid(
        (np.arange(height // cell) + 0.5) * cell, (np.arange(width // cell) + 0.5) * cell, indexing="ij"
    )
    seen = np.empty((*rows.shape, 4), np.int64)
    seen[:] = NOTHING
    tallest = sorted(scene.digits, key=lambda digit: -digit.height)
    for place, digit in enumerate(scene.digits):
        covered = (abs(rows - digit.y) < digit.height / 2) & (abs(columns - digit.x) < 0.45 * digit.height)
        seen[covered] = (digit.value, list(COLOURS).index(digit.colour), place, tallest.index(digit))
    ink = scene.ink.reshape(height // cell, MERGE, PATCH, width // cell, MERGE, PATCH)
    return seen.reshape(-1, 4), ink.transpose(0, 3, 1, 4, 2, 5).reshape(-1, PATCH * PATCH)


class Heads(nn.Module):
    """What teaches the encoder to see: it names digit, colour and places at every token, and draws every patch's ink.

    Digits and colours are named in the words of the text model: a feature is compared with the token embeddings of
    "7" and "red". So what the encoder says about a token is in the language in which it is asked and answered.
    """

    def __init__(self, model: Qwen3VL, tokenizer: Tokenizer) -> None:
        super().__init__()
        channels = model.config.text.hidden_size
        names = [[str(value) for value in range(10)], list(COLOURS), [f" {colour}" for colour in COLOURS]]
        self.words = [torch.tensor([tokenizer.encode(name)[0] for name in group]) for group in names]
        self.nothing = nn.Parameter(torch.randn(3, 1, channels) / math.sqrt(channels))
        self.left, self.tall = nn.Linear(channels, 5), nn.Linear(channels, 5)
        self.ink = nn.Linear(model.config.vision.hidden_size, PATCH * PATCH)

    def forward(self, features: Tensor, embeddings: Tensor, patches: Tensor, batch: dict[str, Tensor]) -> Tensor:
        features = F.rms_norm(features, features.shape[-1:])
        value, colour, left, tall = batch["seen"].unbind(1)
        loss = 5 * F.binary_cross_entropy_with_logits(self.ink(patches), batch["ink"])
        for words, nothing, wanted in zip(self.words, self.nothing, (value, colour, colour)):
            loss = loss + F.cross_entropy(features @ torch.cat((embeddings[words], nothing)).T, wanted)
        return loss + F.cross_entropy(self.left(features), left) + F.cross_entropy(self.tall(features), tall)


class Trainer:
    """The model with the heads, the optimizer, and the stages' losses and learning rates."""

    def __init__(self, options: argparse.Namespace, processor: Processor) -> None:
        self.options = options
        self.stages = options.small, options.small + options.looking
        if options.resume:
            loaded = Qwen3VL.from_pretrained(options.resume, weights="fp32", attention=options.attention)
            self.model = loaded.requires_grad_().train()
            self.model.model.visual.requires_grad_(not options.text_only)
        else:
            self.model = Qwen3VL(build_config(processor), attention=options.attention).train()
            initialise(self.model)
        self.heads = Heads(self.model, processor.tokenizer)
        self.patches = torch.empty(0)
        self.model.model.visual.blocks[1].register_forward_hook(self._keep_patches)
        if options.compile:
            for module in self.model.modules():
                if isinstance(module, (GeluMLP, SwiGLU, LayerNorm)):
                    module.compile()
        self.parameters = [*self.model.parameters(), *self.heads.parameters()]
        matrices, vectors = ([p for p in self.parameters if (p.ndim > 1) == many] for many in (True, False))
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.relative_rate)

    def _keep_patches(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.patches = output

    def relative_rate(self, step: int) -> float:
        """Warm-up and a constant rate for the encoder alone, then warm-up again to 3/4 of it, and a cosine to nothing
        over the last quarter."""
        asking = step - self.stages[1]
        if asking < 0:
            return min(1.0, (step + 1) / 60)
        fading = max(0.0, 4 * self.share_asked(step) - 3)
        return 0.75 * min(1.0, (asking + 1) / 100) * (0.505 + 0.495 * math.cos(math.pi * fading))

    def share_asked(self, step: int) -> float:
        """How much of the third stage is over."""
        return (step - self.stages[1]) / max(1, self.options.asking)

    def losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The heads' loss, and the cross-entropy of the answers' tokens (zero while the encoder learns alone)."""
        if "labels" not in batch:
            features, _ = self.model.model.visual(batch["pixel_values"], batch["image_grid_thw"])
            return self.seeing(features, batch), torch.zeros(())
        logits, wanted, features = self.answers(batch)
        return self.seeing(features, batch), F.cross_entropy(logits, wanted)

    def seeing(self, features: Tensor, batch: dict[str, Tensor]) -> Tensor:
        if self.options.text_only:
            return torch.zeros(())
        embeddings = self.model.model.language_model.embed_tokens.weight
        return self.heads(features, embeddings, self.patches, batch)

    def answers(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and ids of all the answers' tokens, row after row, and the visual tokens' features."""
        names = ("pixel_values", "image_grid_thw", "input_ids", "attention_mask")
        inputs = self.model.embed_inputs(**{name: batch[name] for name in names})
        features = inputs.embeds[batch["input_ids"] == self.model.config.image_token_id]
        labels = batch["labels"][:, 1:]
        chosen = labels != IGNORED
        hidden = self.model.hidden_states(inputs)[:, :-1]
        return self.model.lm_head(hidden[chosen]), labels[chosen], features

    def step(self, number: int, batch: dict[str, Tensor]) -> tuple[float, float]:
        seeing, answers = self.losses(batch)
        loss = answers + seeing * min(1.0, max(0.2, 1 - 2 * self.share_asked(number)))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        return seeing.item(), answers.item()

    @torch.no_grad()
    def examine(self, exam: tuple[dict[str, Tensor], list[str]]) -> dict[str, float]:
        """For every kind the share of questions whose every answer token is the likeliest, which is what greedy
        generation would write."""
        batch, kinds = exam
        logits, wanted, _ = self.answers(batch)
        row = (batch["labels"][:, 1:] != IGNORED).nonzero()[:, 0]
        wrong = torch.zeros(len(kinds)).index_add(0, row, (logits.argmax(-1) != wanted).float())
        right = {kind: [float(w == 0) for w, k in zip(wrong, kinds) if k == kind] for kind in ASKED}
        return {kind: sum(marks) / max(1, len(marks)) for kind, marks in right.items()}


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    processor = build_processor()
    trainer = Trainer(options, processor)
    scenes = Scenes(processor, split_scans(load_scans().labels)[0], options, trainer.stages)
    loader = DataLoader(
        scenes, batch_size=None, num_workers=options.workers, prefetch_factor=8 if options.workers else None
    )
    start = time.time()
    for number, batch in enumerate(tqdm(loader, total=len(scenes), mininterval=10)):
        seeing, answers = trainer.step(number, batch)
        asked, line = number + 1 - trainer.stages[1], ""
        if asked > 0 and (asked + AHEAD) % options.round == 0:
            right = trainer.examine(scenes.exam(asked, options.exam))
            scenes.mixture[(asked + AHEAD) // options.round] = torch.tensor([1.05 - right[kind] for kind in ASKED])
            line = ", right " + " ".join(f"{kind} {share:.0%}" for kind, share in right.items())
        if line or number % 100 == 99 or number == len(scenes) - 1:
            tqdm.write(
                f"step {number + 1}: seeing {seeing:.3f}, answers {answers:.3f}{line}, {time.time() - start:.0f} s"
            )
    save(trainer.model, processor, Path(options.out))


def save(model: Qwen3VL, processor: Processor, folder: Path) -> None:
    """The released format, weights in bfloat16: what is on disk is what is evaluated."""
    processor.save_pretrained(folder)
    save_pretrained(model.eval().to(torch.bfloat16), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ASSETS), help="folder of the checkpoint")
    parser.add_argument("--small", type=int, default=600, help="steps on small pictures of one digit")
    parser.add_argument("--looking", type=int, default=2000, help="steps on scenes without questions")
    parser.add_argument("--asking", type=int, default=2600, help="steps on scenes with questions")
    parser.add_argument("--round", type=int, default=100, help="steps with one mixture of questions, above 20")
    parser.add_argument("--exam", type=int, default=64 * len(ASKED), help="questions that decide what is asked next")
    parser.add_argument("--batch", type=int, default=48, help="scenes a step")
    parser.add_argument("--turns", type=int, default=4, help="questions about each scene")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", metavar="FOLDER", help="start from these weights; the heads start anew")
    parser.add_argument("--text-only", action="store_true", help="with --resume: the vision encoder stays as it is")
    parser.add_argument("--attention", nargs="+", metavar="NAME", help="of the text layers, see qvl_model/attention.py")
    parser.add_argument("--workers", type=int, default=1, choices=(0, 1, 2), help="processes that draw scenes")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=shutil.which("g++") is not None)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
