# SPDX-License-Identifier: Apache-2.0
"""Aich et al., "GAMA: Generative Adversarial Multi-Object Scene Attacks" (arXiv 2209.09502).

A network learns to disturb scenes of two digits so that other people's classifiers fail. Beside the attacker's own
classifier it is led by a dual encoder of scenes and words (`pycore.ops.contrastive_loss`), or not.
"""

import torch
from paper import Figures, Paper, Run, main
from pictures import DIM, PIXELS, SHAPE, Pictures, Stack
from torch import Tensor, nn
from torch.nn import functional

from pycore import ops
from pycore.models.bytelm import BytelmConfig
from pycore.models.transformer import Transformer, mean_pool
from pycore.schedules import Full

PAPER = Paper(
    2,
    "GAMA: Generative Adversarial Multi-Object Scene Attacks",
    "a generator of perturbations that is led by a vision-language model's image and text features, beside a surrogate"
    " classifier's, fools unseen classifiers of other architectures on scenes of several objects more often",
    "scenes of two handwritten digits side by side; perturbations of at most 0.15 a pixel; surrogate: two layers"
    " on half of the digits; victims on the other half: a wider network, a transformer over 2 by 8 rows; the share of"
    " digits in held-out scenes that victims name wrongly",
)
LIMIT, WIDE = 0.15, 2 * PIXELS
ROWS = BytelmConfig(layers=1, dim=DIM, heads=4, kv_heads=4, position="none")


class Scenes:
    """Two digits side by side, [n, 128]; attacker and victims have seen different ones."""

    def __init__(self, run: Run) -> None:
        self.run, self.pictures = run, Pictures(run)
        half = len(self.pictures.labels) // 2
        self.parts = {
            "attacker": (self.pictures.images[:half], self.pictures.labels[:half]),
            "victim": (self.pictures.images[half:], self.pictures.labels[half:]),
            "held": (self.pictures.held_images, self.pictures.held_labels),
        }

    def draw(self, part: str, count: int) -> tuple[Tensor, Tensor]:
        """Scenes and labels [n, 2]."""
        images, labels = self.parts[part]
        rows = self.run.integers(len(images), count, 2)
        return images[rows].flatten(1), labels[rows]


class Classifier(nn.Module):
    """Features of a scene for its left digit and its right one, scored with ten classes."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.classes = body, nn.Parameter(torch.randn(10, DIM) * 0.1)

    def features(self, scenes: Tensor) -> Tensor:
        """[n, 2, DIM]."""
        return self.body(scenes).unflatten(1, (2, DIM))

    def loss(self, scenes: Tensor, labels: Tensor) -> Tensor:
        """Mean over digits."""
        return ops.linear_cross_entropy(self.features(scenes), self.classes, labels)

    @torch.no_grad()
    def wrong(self, scenes: Tensor, labels: Tensor) -> float:
        """The share of digits named wrongly."""
        guess = ops.invariant_linear(self.features(scenes), self.classes).argmax(-1)
        return (guess != labels).double().mean().item()


class RowReader(nn.Module):
    """A transformer over the 16 rows of 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = Transformer(ROWS, inputs=8, absolute=16), Stack(DIM, 2 * DIM)

    def forward(self, scenes: Tensor) -> Tensor:
        return self.out(self.body(scenes.unflatten(1, (16, 8)), schedule=Full()).mean(1))


def experiment(run: Run) -> dict[str, float]:
    """The same generator with the dual encoder's features and without."""
    scenes, surrogate = Scenes(run), Classifier(Stack(WIDE, 96, 2 * DIM))
    victims = {"wider": Classifier(Stack(WIDE, 256, 128, 2 * DIM)), "transformer": Classifier(RowReader())}
    see, read, scale = Stack(WIDE, 128, DIM), Transformer(SHAPE, vocabulary=20), nn.Parameter(torch.tensor(2.3))

    def words(labels: Tensor) -> Tensor:
        """A text's vector: what is on the left, what on the right."""
        return mean_pool(read(labels + torch.tensor([0, 10]), schedule=Full()))

    def agree(step: int) -> Tensor:
        images, labels = scenes.draw("attacker", 96)
        left = functional.normalize(see(images), dim=-1)
        positives = labels[:, 0] * 10 + labels[:, 1]
        own = positives.unique(return_inverse=True)
        texts = words(torch.stack([own[0] // 10, own[0] % 10], 1))
        return ops.contrastive_loss(left, texts, scale=scale.exp().clamp(max=100.0), symmetric=False, positives=own[1])

    run.fit("surrogate", surrogate, lambda step: surrogate.loss(*scenes.draw("attacker", 96)), 400)
    run.fit("dual encoder", [*see.parameters(), *read.parameters(), scale], agree, 500)
    for name, victim in victims.items():
        run.fit(f"victim, {name}", victim, lambda step, victim=victim: victim.loss(*scenes.draw("victim", 96)), 600)
    for part in (surrogate, see, read, *victims.values()):
        part.requires_grad_(False)
    asked, answers = scenes.draw("held", run.pick(1000, 50))
    noise = LIMIT * (run.uniform(*asked.shape) < 0.5).float().mul(2).sub(1)
    figures = {f"{name}, clean": victim.wrong(asked, answers) for name, victim in victims.items()}
    figures |= {f"{name}, noise": victim.wrong(asked + noise, answers) for name, victim in victims.items()}
    for name in ("surrogate alone", "with text"):
        torch.manual_seed(run.seed)
        attack = Stack(WIDE, 256, WIDE)

        def disturb(step: int, name: str = name, attack: Stack = attack) -> Tensor:
            images, labels = scenes.draw("attacker", 96)
            bad = images + LIMIT * attack(images).tanh()
            found = functional.cosine_similarity(surrogate.features(bad), surrogate.features(images), dim=-1).mean()
            if name == "with text":  # away from the scene and its words, towards the words of another scene
                vector, other = functional.normalize(see(bad), dim=-1), words(labels.roll(1, 0))
                own = functional.normalize(see(images), dim=-1)
                found = found + (vector * (own + words(labels) - other)).sum(-1).mean()
            return found

        run.fit(name, attack, disturb, 400)
        with torch.no_grad():
            bad = asked + LIMIT * attack(asked).tanh()
        figures |= {f"{victim}, {name}": network.wrong(bad, answers) for victim, network in victims.items()}
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """Each victim for itself."""
    return [
        (
            f.above(f"{victim}, with text", f"{victim}, surrogate alone"),
            f"the {victim} victim is wrong {f[f'{victim}, with text']:.3f} with text features, "
            f"{f[f'{victim}, surrogate alone']:.3f} without, {f[f'{victim}, noise']:.3f} under noise of the same size, "
            f"{f[f'{victim}, clean']:.3f} undisturbed",
        )
        for victim in ("wider", "transformer")
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))
