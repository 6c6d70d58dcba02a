"""Scoring a state: on the evaluation set, and on the examples that stand for each client."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from federa.engines import Clients
from federa.experiment import Experiment
from federa.seeds import generator
from federa.types import Job, RoundFailedError, State

MAX_CLIENTS_WITH_OWN_HEAD = 200  # evaluated one by one


class Evaluator:
    """Scores states of one experiment; the predictions of the last one are kept.

    With `method.head=local` there is no global head: the own head of each client that has trained is measured
    on the examples that stand for it.

    Args:
        experiment: whose.
        session: predicts.
        told: is given how many batches (or clients) are done, and of how many.
    """

    def __init__(self, experiment: Experiment, session: Clients, told: Callable[[int, int], None]) -> None:
        self._experiment, self._session, self._told = experiment, session, told
        self._last: tuple[State, list[Any]] | None = None

    def score(self, params: State, reached: Collection[int]) -> dict[str, float]:
        """Return the task's metrics on the evaluation set; with local heads the mean over clients.

        Args:
            params: the global state.
            reached: the clients that have trained.
        """
        experiment, task = self._experiment, self._experiment.config.task
        if experiment.kept.start:
            scores = self._own_heads(params, reached)
            if not scores:
                raise RoundFailedError(
                    "evaluation: no client that has trained has evaluation examples of its groups. "
                    "The last good state is kept"
                )
            return {"clients_evaluated": len(scores), task.primary: float(np.mean(scores))}
        data = experiment.evaluation
        return task.score(self.predictions(params), data, np.arange(data.num_examples))

    def per_client(self, params: State, reached: Collection[int]) -> dict[str, float] | None:
        """Return mean, 10th percentile and worst of the clients' own metrics, or None for no examples."""
        experiment, task = self._experiment, self._experiment.config.task
        if experiment.kept.start:
            scores = self._own_heads(params, reached)
        else:
            predictions, scores = self.predictions(params), []
            for client in range(len(experiment.parts)):
                examples = experiment.client_examples(client)
                if task.scorable(experiment.evaluation, examples):
                    own = [predictions[example] for example in examples]
                    scores.append(task.score(own, experiment.evaluation, examples)[task.primary])
        if not scores:
            return None
        return {
            "mean": float(np.mean(scores)),
            "p10": float(np.percentile(scores, 10)),
            "worst": float(min(scores)),
        }

    def predictions(self, params: State) -> list[Any]:
        """Return the prediction for every evaluation example, in order."""
        if self._last is not None and self._last[0] is params:
            return self._last[1]
        data = self._experiment.evaluation
        rows = np.arange(len(data))
        batches = self._experiment.batches(rows)
        outputs: list[Any] = [None] * len(rows)
        answers = self._session.predict(params, batches)
        for done, (batch, out) in enumerate(zip(batches, answers, strict=True), 1):
            for row, value in zip(batch, out, strict=True):
                outputs[row] = value
            self._told(done, len(batches))
        predictions = self._experiment.config.task.decode(outputs, data, np.arange(data.num_examples))
        self._last = (params, predictions)
        return predictions

    def _own_heads(self, params: State, reached: Collection[int]) -> list[float]:
        """Return the metric of every client that has trained (of 200 drawn ones, if there are more)."""
        experiment, config, data = self._experiment, self._experiment.config, self._experiment.evaluation
        clients, limit = np.array(sorted(reached)), MAX_CLIENTS_WITH_OWN_HEAD
        if len(clients) > limit:
            clients = np.sort(generator(config.seed, "own-heads").choice(clients, limit, replace=False))
        scores = []
        for done, client in enumerate(clients, 1):
            examples = experiment.client_examples(int(client))
            if config.task.scorable(data, examples):
                rows = data.rows_of(examples)
                batches = experiment.batches(rows)
                last = Job(config.rounds + 1, int(client), 0, 0.0)  # after every round: what it kept last
                answers = (o for out in self._session.predict(params, batches, last) for o in out)
                outputs = dict(zip(np.concatenate(batches).tolist(), answers, strict=True))
                predictions = config.task.decode([outputs[row] for row in rows.tolist()], data, examples)
                scores.append(config.task.score(predictions, data, examples)[config.task.primary])
            self._told(done, len(clients))
        return scores
