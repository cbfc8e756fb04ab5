"""VTokenConfig: a strategy, its budget and its options, saved as a small JSON file in a model's folder."""

from __future__ import annotations

import functools
import json
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelHubMixin, hf_hub_download
from huggingface_hub.errors import HFValidationError

from ._json import check_depth, read
from .checks import fit_field, found
from .naming import name_of, split_outside
from .strategies import Strategy
from .strategies.budgets import UNIT, Budget, check_budget, with_unit
from .strategies.trained import trained_names

CONFIG_FILE = "vtoken_config.json"
WEIGHTS_FILE = "vtoken_strategy.safetensors"  # of strategies that are trained, in the same folder
FORMAT_VERSION = 1
LARGEST = 2**20  # bytes of the file


@dataclass
class VTokenConfig(ModelHubMixin, library_name="vtoken"):
    """The arguments of `vtoken.patch`, to be saved, loaded and pushed to the Hub.

    Args:
        strategy: a registered name, see `vtoken.list_strategies()`, or several that are applied together.
        budget: a float in (0, 1] is the share of the visual tokens that the unpatched model would feed to the
            LLM; an int is a number of tokens per image or per frame. `1.0` and `1` differ and stay different
            on disk. None leaves it to the strategy, as for tome with `options={"r": 8}`.
        positions: "original" or "renumber"; None is the strategy's own default.
        options: the strategy's hyper-parameters by name, JSON values only; of several strategies, one such
            mapping per strategy's name. `vtoken.patch` checks the types and ranges of their values.
        version: format of the file.
        weights: the file with trained weights that `from_pretrained` found with the config; no part of it.

    Raises:
        ValueError: for an empty strategy, a budget out of range, a value of another type than its field's, or
            options that JSON cannot hold.
    """

    strategy: str | list[str]
    budget: float | int | None = 0.2
    positions: Literal["original", "renumber"] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    version: int = FORMAT_VERSION
    weights: Path | None = field(default=None, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        names = [self.strategy] if isinstance(self.strategy, str) else self.strategy
        if (
            not isinstance(names, (list, tuple))
            or not names
            or not all(isinstance(n, str) and n for n in names)
        ):
            raise ValueError(
                f"strategy must be a name such as 'hired' or a list of names, found {found(self.strategy)}."
            )
        self.strategy = names[0] if isinstance(self.strategy, str) else list(names)
        self.budget = None if self.budget is None else check_budget(self.budget)
        if not isinstance(self.options, dict) or not all(isinstance(k, str) for k in self.options):
            raise ValueError(
                f"options must map hyper-parameter names to values, found {found(self.options)}."
            )
        self.positions = fit_field(VTokenConfig, "positions", self.positions)
        self.version = fit_field(VTokenConfig, "version", self.version)
        if self.version < 1:
            raise ValueError(f"version must be at least 1, found {self.version}.")
        if twice := [name for name in ("budget", "positions") if name in self.options]:
            raise ValueError(
                f"{twice[0]} stands beside options in a vtoken config, not in them: move it out of options."
            )
        try:
            check_depth(self.options)
        except ValueError as error:
            raise ValueError(f"options must be a mapping of plain values, and {error}.") from None
        # tuples become lists here and not when the file is read, so that equality survives a round trip
        try:
            self.options = json.loads(json.dumps(self.options, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"options must hold JSON values only, found {found(self.options)}: {error}."
            ) from None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, and "budget_unit": "share" or "tokens", the unit of the budget.

        Raises:
            ValueError: for a field that was assigned a wrong value.
        """
        self.__post_init__()
        told = {name: value for name, value in asdict(self).items() if name != "weights"}
        return told | ({} if self.budget is None else {UNIT: Budget(self.budget).unit})

    @classmethod
    def of(cls, strategy: Strategy) -> VTokenConfig:
        """The config of a strategy or a combination; options that have their defaults are left out.

        Raises:
            ValueError: for options that JSON cannot hold.
        """
        parts: Sequence[Strategy] = getattr(strategy, "parts", ())
        if not parts:
            return cls(strategy.info.name, strategy.budget, strategy.positions, _options(strategy))
        own = strategy.budget is None
        options: dict[str, Any] = {
            p.info.name: _options(p) | ({"budget": p.budget} if own and p.budget is not None else {})
            for p in parts
        }
        options = {name: given for name, given in options.items() if given}
        if strategy.split != type(strategy).split:  # type: ignore[attr-defined]
            options["split"] = strategy.split  # type: ignore[attr-defined]
        return cls([p.info.name for p in parts], strategy.budget, strategy.positions, options)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VTokenConfig:
        """Build a config from `to_dict`'s output; a warning names unknown keys, which are ignored.

        Raises:
            ValueError: if `values` is no mapping, names no strategy, or holds a value of a wrong type.
        """
        if not isinstance(values, dict) or "strategy" not in values:
            raise ValueError(
                f"A vtoken config is a JSON object with at least the key 'strategy', found {found(values)}."
            )
        known = {f.name for f in fields(cls) if f.name != "weights"}  # a file names no file to read
        values = with_unit(values)
        if unknown := sorted(set(values) - known, key=str):
            keys = ", ".join(map(found, unknown[:8])) + ", ..." * (len(unknown) > 8)
            warnings.warn(
                f"vtoken ignores the unknown config key(s) {keys}; it knows {', '.join(sorted(known))}.",
                stacklevel=2,
            )
        config = cls(**{k: v for k, v in values.items() if k in known})
        if config.version > FORMAT_VERSION:
            warnings.warn(
                f"This vtoken config has format version {config.version} and this vtoken reads up to"
                f" {FORMAT_VERSION}; a newer vtoken may read more from it.",
                stacklevel=2,
            )
        return config

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, push_to_hub: bool = False, **kwargs: Any
    ) -> str | None:
        """Write `vtoken_config.json` into a folder, made if needed; its other files stay as they are.

        Trained weights that were found with the config are copied along.

        Args:
            save_directory: the folder, for instance the one that holds the model.
            push_to_hub: also call `push_to_hub(**kwargs)`; `repo_id` defaults to the folder's name.

        Returns:
            The URL of the commit if it was pushed, None otherwise.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_pretrained writes into a folder, but {str(folder)!r} is a file.")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        target = folder / WEIGHTS_FILE
        trained = self.weights if is_trained(self.strategy) else None
        if trained is not None and trained.is_file() and trained.resolve() != target.resolve():
            shutil.copyfile(trained, target)
        if push_to_hub:
            return self.push_to_hub(kwargs.pop("repo_id", None) or folder.resolve().name, **kwargs)
        return None

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> VTokenConfig:
        """Load from a folder, from the JSON file itself, or from a Hub repository.

        Args:
            pretrained_model_name_or_path: the folder, the file or the repository's id; the other arguments
                are those of `huggingface_hub.hf_hub_download`.

        Raises:
            OSError: if there is no `vtoken_config.json` there.
            ValueError: if the file is not a vtoken config: no JSON, nested more than 100 levels deep, larger
                than 1 MiB, or of another shape.
        """
        source = os.fsdecode(pretrained_model_name_or_path)
        path, fetch = Path(source), None
        if path.is_dir():
            path = path / CONFIG_FILE
            if not path.exists():
                raise FileNotFoundError(
                    f"The folder {source!r} has no {CONFIG_FILE}; "
                    f"write one with VTokenConfig(...).save_pretrained({source!r})."
                )
        elif not path.is_file():
            fetch = functools.partial(
                hf_hub_download,
                source,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
            try:
                path = Path(fetch(CONFIG_FILE))
            except (HFValidationError, OSError) as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise OSError(
                    f"No {CONFIG_FILE} found for {source!r}: it is neither a folder nor a file here, "
                    f"and the Hub answered {type(error).__name__} ({reason})."
                ) from error
        config = cls.from_dict(read(path, LARGEST))
        if is_trained(config.strategy):
            config.weights = Path(fetch(WEIGHTS_FILE)) if fetch else path.parent / WEIGHTS_FILE
        return config


def _options(strategy: Strategy) -> dict[str, Any]:
    """The options of a strategy that differ from their defaults, without budget and positions."""
    each = ((f.name, f.default, getattr(strategy, f.name)) for f in fields(strategy) if f.init)
    return {n: value for n, default, value in each if n not in ("budget", "positions") and value != default}


def is_trained(names: str | list[str]) -> bool:
    """Whether a strategy of these names has weights; False for names that are not known."""
    some = split_outside(names, "+") if isinstance(names, str) else names
    return not set(trained_names()).isdisjoint(map(name_of, some))
