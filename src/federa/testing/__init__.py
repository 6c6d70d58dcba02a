"""Contract tests for components: call them from the tests of a plugin.

Each takes a component, returns nothing, and raises AssertionError that says what the component broke.
They need no test framework:

    def test_my_partitioner():
        check_partitioner(MyPartitioner(clients=8))
"""

from federa.testing.components import check_aggregator, check_partitioner, check_server_optimizer, check_wire
from federa.testing.models import check_method, check_task

__all__ = [
    "check_aggregator",
    "check_method",
    "check_partitioner",
    "check_server_optimizer",
    "check_task",
    "check_wire",
]
