"""Serves a policy over the network, as openpi's robot clients and evaluators of policies speak.

    python serve_policy.py --checkpoint checkpoints/phase2_flow_matching/checkpoint_best.pt
    python run_libero_eval.py --policy ws://127.0.0.1:8000

It listens for programs on this machine alone, unless --host says otherwise. A client's messages are answered with
chunks of actions, or with one sentence on what is wrong with them. SIGTERM and Ctrl-C end it with exit code 0, after
the decision under way. docs/serving.md has the protocol.
"""

import argparse
import asyncio
import os
import signal

import torch

from config import add_set_flag
from demos.language import LanguageTable, with_embeddings_of
from errors import BadInput, exits_on_bad_input, extras_named
from files import expanded
from observation import nothing_seen
from rollouts.evaluation import SAMPLE_STEPS, check_range
from rollouts.policies import check_observation, policy_of_checkpoint
from serving import API_KEY
from training.checkpoint import config_of, read_checkpoint


@exits_on_bad_input
def main() -> None:
    arguments = parse_arguments()
    with extras_named():
        from serving.policy_server import PolicyServer
        from serving.served_checkpoint import begin, metadata_of, reader_of

    # The policy, with the instructions that it was trained on and those that are asked for besides.
    checkpoint = read_checkpoint(arguments.checkpoint, phase=2)
    check_observation(checkpoint["observation"], arguments.checkpoint)
    config = config_of(checkpoint, arguments.checkpoint, arguments.set)
    policy, of_policy = policy_of_checkpoint(
        checkpoint, arguments.checkpoint, config, {}, arguments.sample_steps, arguments.flow_start, arguments.precision
    )
    language = with_embeddings_of(arguments.instructions, LanguageTable(**checkpoint["language"]))
    size = checkpoint["observation"]["image_size"]
    policy.decide_for([nothing_seen(size)], [next(iter(language.embeddings.values()))], [torch.Generator()])  # warm

    # The server.
    reader = reader_of(checkpoint, config.model.image_size, language)
    metadata = metadata_of(checkpoint, of_policy, policy.steps, reader)
    server = PolicyServer(
        lambda: begin(policy, language), reader, metadata, arguments.host, arguments.port, arguments.api_key
    )
    asyncio.run(listen(server))
    print(f"stopped after {server.decisions} decisions, for at most {server.most_clients} clients at once")


async def listen(server) -> None:
    """Until a signal ends it."""
    ended, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    async with server:
        whom = "for programs on this machine alone" if server.is_local else "for whoever can reach this machine"
        print(f"listening on {server.address}, {whom}; Ctrl-C ends it", flush=True)
        if not server.is_local and server.api_key is None:
            print(f"warning: without --api_key or {API_KEY} it answers everyone who reaches it", flush=True)
        await ended.wait()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Serves a phase-2 checkpoint to openpi's clients.")
    add = parser.add_argument
    # fmt: off
    add("--checkpoint", type=expanded, required=True, help="phase-2 checkpoint")
    add("--host", default="127.0.0.1",
        help="address to listen on; 0.0.0.0 is all of this machine's (default: %(default)s, this machine alone)")
    add("--port", type=int, default=8000, help="0 takes any that is free (default: %(default)s)")
    add("--api_key", metavar="KEY",
        help=f"what clients have to name; other users of this machine see it, unless it stands in the environment "
        f"variable {API_KEY} instead (default: none is asked for)")
    add("--instructions", nargs="+", action="extend", default=[], metavar="TEXT",
        help="instructions besides those of the training, embedded by the checkpoint's own text encoder")
    add("--sample_steps", type=int, default=SAMPLE_STEPS, help="Euler steps of the flow (default: %(default)s)")
    add("--flow_start", choices=("noise", "zero"),
        help="integrate the flow from Gaussian noise or from its mean (default: the checkpoint's phase2.flow_start)")
    add("--precision", choices=("fp32", "bf16"), default="fp32",
        help="of the policy's matrix products (default: %(default)s)")
    add_set_flag(parser)
    # fmt: on
    arguments = parser.parse_args()
    arguments.api_key = arguments.api_key or os.environ.get(API_KEY) or None
    if arguments.api_key and not (arguments.api_key.isascii() and arguments.api_key.isprintable()):
        raise BadInput("--api_key: has characters that no HTTP header can carry; expected printable ASCII")
    if not 0 <= arguments.port <= 65535:
        raise BadInput(f"--port {arguments.port}: expected 0 to 65535")
    check_range("sample_steps", arguments.sample_steps)
    return arguments


if __name__ == "__main__":
    main()
