"""Central differential privacy of clients: clipped updates, Gaussian noise on their sum, and its worth.

DP-FedAvg (McMahan, Ramage, Talwar, Zhang 2018, arXiv 1710.06963) with fixed clipping and cohorts of a fixed
size drawn without replacement. Two federations are neighbours if one client's data are replaced by any other;
then the sum of a cohort's clipped updates moves by at most 2 * clip. The accounting is dp-accounting's, by
Renyi divergences of the Gaussian mechanism sampled without replacement (Wang, Balle, Kasiviswanathan 2019,
arXiv 1808.00087, theorem 27). It covers the model after every round. It does not cover the run's record, in
which losses, numbers of examples and verdicts are as the clients gave them.
"""

from __future__ import annotations

import functools
import secrets
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from federa.seeds import seed_for
from federa.state import norm
from federa.types import FederaError, State, Update


class Privacy(BaseModel):
    """Central differential privacy of whole clients.

    Attributes:
        clip: the longest update that counts whole (L2 norm over all tensors); longer ones are scaled down.
        noise_multiplier: standard deviation of the noise on a cohort's sum, over 2 * clip.
        delta: of (epsilon, delta); well below one over the number of clients.
        noise: `secret` draws from the operating system, so that nobody can take it away again; `seeded` from
            the recipe's seed, which whoever has the recipe can: for experiments only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    clip: float = Field(gt=0)
    noise_multiplier: float = Field(gt=0)
    delta: float = Field(default=1e-5, gt=0, lt=1)
    noise: Literal["secret", "seeded"] = "secret"

    def clipped(self, update: Update) -> Update:
        """Return an update whose norm is at most `clip`."""
        return Update(update.job, self.clipped_delta(update.delta), update.weight, update.metrics)

    def clipped_delta(self, delta: State) -> State:
        """Return a delta whose norm is at most `clip`; one that is not finite stays so, to be refused."""
        length = norm(delta)
        if length <= self.clip:
            return delta
        return {name: t * (self.clip / length) for name, t in delta.items()}

    def noised(
        self, mean: State, counted: int, cohort: int, seed: int, round_number: int
    ) -> dict[str, Tensor]:
        """Return the noised sum of a round's updates over the size of its cohort.

        Who did not answer, or was refused, counts as an update of zeros: the divisor must not depend on the
        data.

        Args:
            mean: of the clipped updates that counted.
            counted: how many.
            cohort: how many were asked.
            seed: of the recipe.
            round_number: counted from 1.
        """
        secret = self.noise == "secret"
        key = secrets.randbits(63) if secret else seed_for(seed, "privacy", round_number)
        generator = torch.Generator().manual_seed(key)
        spread = 2 * self.clip * self.noise_multiplier
        noise = {name: spread * _normal(mean[name], generator) for name in sorted(mean)}  # a resume's order
        return {name: ((t.double() * counted + noise[name]) / cohort).float() for name, t in mean.items()}

    def epsilon(self, rounds: int, cohort: int, clients: int) -> float:
        """Return the epsilon of all clients after so many rounds.

        Args:
            rounds: finished ones.
            cohort: clients drawn for each.
            clients: of the federation.

        Raises:
            FederaError: the accountant is not installed.
        """
        return _epsilon(self.noise_multiplier, self.delta, rounds, cohort, clients)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64)


@functools.lru_cache(maxsize=4096)
def _epsilon(noise_multiplier: float, delta: float, rounds: int, cohort: int, clients: int) -> float:
    accounting = require_accounting()
    relation = accounting.NeighboringRelation.REPLACE_ONE
    accountant = accounting.rdp.RdpAccountant(neighboring_relation=relation)
    one = accounting.GaussianDpEvent(noise_multiplier)
    if cohort < clients:
        one = accounting.SampledWithoutReplacementDpEvent(clients, cohort, one)
    accountant.compose(one, rounds)
    return float(accountant.get_epsilon(delta))


def require_accounting() -> Any:
    """Return the accountant's package.

    Raises:
        FederaError: it is not installed.
    """
    try:
        import dp_accounting
        import dp_accounting.rdp
    except ImportError as error:
        raise FederaError('privacy: needs its accountant: pip install "federa[privacy]"') from error
    return dp_accounting
