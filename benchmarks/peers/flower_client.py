"""Flower's client side, a module of its own: actors import it by name, so its cache outlives a message."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from learner import resident
from workload import Order

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the client that the message names; which node carries it makes no difference to the work."""
    config = message.content["config"]
    order = Order.from_json(str(config["order"]))
    learner = resident(order.plan, order.dropout, order.threads)
    params = message.content["arrays"].to_torch_state_dict()
    after, seconds = learner.train(params, int(config["server-round"]), int(config["client"]))
    metrics = {"num-examples": learner.plan.workload.examples, "seconds": seconds}
    content = RecordDict({"arrays": ArrayRecord(after), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=message)
