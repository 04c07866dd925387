"""Train the embedded models again: `python -m madit.zoo.train shapes --out RUN`, then `detail`; and `classifiers`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from madit.zoo.detail import train_detail
from madit.zoo.training import train_classifiers, train_shapes

STEPS = {"shapes": 6500, "classifiers": 1500, "detail": 2000}
RATES = {"shapes": 1e-3, "classifiers": 2e-3, "detail": 5e-4}


def main(argv: list[str] | None = None) -> None:
    """Run the command; a run that was cut off goes on when called again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=STEPS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="detail: the snapshot of shapes to start from")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    steps = STEPS[args.what] if args.steps is None else args.steps
    lr = RATES[args.what] if args.lr is None else args.lr
    if args.what == "detail":
        if args.base is None:
            parser.error("detail needs --base, a snapshot of shapes")
        train_detail(args.out, steps, args.seed, lr, args.base)
    elif args.what == "shapes":
        train_shapes(args.out, steps, args.seed, lr)
    else:
        train_classifiers(args.out, steps, args.seed, lr)


if __name__ == "__main__":
    main()
