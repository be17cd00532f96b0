"""What the batches of a server cost on ONNX Runtime's CPU provider: a session for each, or one for all.

A server's batch changes from call to call. For batches 1 … 8 of one U-Net, in a process for each mode: resident memory
after each batch was run, CPU seconds to make its session, and of one call, with

- `own`: a session for each batch, with the batch fixed and weights of its own;
- `shared`: the same with one copy of the weights given to all (`SessionOptions.add_initializer`);
- `shared, not packed`: the same, and no kernel makes a packed copy of them;
- `packed once`: a session for each batch of a graph that was saved with its packed weights
  (`session.save_external_prepacked_constant_initializers`), whose file all of them map;
- `one`: one session whose batch is open. This is what `OrtNetwork` has.

ONNX Runtime's container of packed weights that sessions share is not in its Python interface.

Processes that run one after the other meet another load of the machine each, so calls of `one` and `own` are also timed
in turn in one process: `one_to_own` is the ratio of their median CPU seconds, by batch.

    python -m benchmarks.serving_sessions       # two minutes on one core
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from pnp_trt.bundle.provenance import provenance
from pnp_trt.bundle.store import open_bundle, write_json

RESULTS = Path(__file__).parent / "results"
MODES = ("own", "shared", "shared, not packed", "packed once", "one")
BATCHES = 8
#: one mode in a process of its own
PROGRAM = """
import gc, json, sys, tempfile, time
from pathlib import Path
import numpy as np, onnx, onnxruntime as ort, psutil
from onnx import external_data_helper, numpy_helper
graph, mode, most = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
shared = {}
if mode == "packed once":
    # in a folder that ends with the process; the sessions that are measured are made of what is saved here
    held = tempfile.TemporaryDirectory()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.optimized_model_filepath = str(Path(held.name) / "saved.onnx")
    for key, value in (("optimized_model_external_initializers_file_name", "saved.data"),
                       ("optimized_model_external_initializers_min_size_in_bytes", "1024"),
                       ("save_external_prepacked_constant_initializers", "1")):
        options.add_session_config_entry(f"session.{key}", value)
    ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    graph = Path(options.optimized_model_filepath)
if mode.startswith("shared"):
    for tensor in onnx.load(graph, load_external_data=False).graph.initializer:
        if external_data_helper.uses_external_data(tensor):
            shared[tensor.name] = ort.OrtValue.ortvalue_from_numpy(numpy_helper.to_array(tensor, str(graph.parent)))
gc.collect()
process, kept, seen = psutil.Process(), [], []
base, session = process.memory_info().rss, None
for batch in range(1, most + 1):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    if mode != "one":
        options.add_free_dimension_override_by_name("batch", batch)
    if mode.endswith("not packed"):
        options.add_session_config_entry("session.disable_prepacking", "1")
    for name, value in shared.items():
        options.add_initializer(name, value)
    started = time.process_time()
    if mode != "one" or session is None:
        session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    made = time.process_time() - started
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    feed = {i.name: np.ones([d if isinstance(d, int) else batch for d in i.shape], kinds[i.type])
            for i in session.get_inputs()}
    calls = []
    for _ in range(4):
        started = time.process_time()
        session.run(None, feed)
        calls.append(time.process_time() - started)
    kept.append(session)
    seen.append({"batch": batch, "resident_bytes": process.memory_info().rss - base, "made_s": made,
                 "call_s": sorted(calls[1:])[1]})
print(json.dumps(seen))
"""
#: both kinds of session in one process, their calls in turn
RATIO = """
import json, sys, time
import numpy as np, onnxruntime as ort
graph, found = sys.argv[1], {}
def session(batch):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    if batch:
        options.add_free_dimension_override_by_name("batch", batch)
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
one, kinds = session(None), {"tensor(float)": np.float32, "tensor(int64)": np.int64}
for batch in (1, 2, 4, 8):
    feed = {i.name: np.ones([d if isinstance(d, int) else batch for d in i.shape], kinds[i.type])
            for i in one.get_inputs()}
    times, pair = {"one": [], "own": []}, {"one": one, "own": session(batch)}
    for _ in range(160 // batch):
        for name, held in pair.items():
            started = time.thread_time()
            held.run(None, feed)
            times[name].append(time.thread_time() - started)
    found[batch] = float(np.median(times["one"][1:]) / np.median(times["own"][1:]))
print(json.dumps(found))
"""


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="emoji-tiny")
    parser.add_argument("--out", type=Path, default=RESULTS / "serving-sessions-emoji.json")
    given = parser.parse_args()
    graph = open_bundle(given.engine).file("unet")
    found = {}
    for mode in MODES:
        command = [sys.executable, "-c", PROGRAM, str(graph), mode, str(BATCHES)]
        found[mode] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        print(mode, [round(each["resident_bytes"] / 2**20) for each in found[mode]], "MiB", flush=True)
    command = [sys.executable, "-c", RATIO, str(graph)]
    ratio = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    print("one to own", {batch: round(value, 3) for batch, value in ratio.items()}, flush=True)
    write_json(
        given.out,
        {
            "schema": "pnp-trt/serving-sessions/1",
            "provenance": provenance(["python", "-m", "benchmarks.serving_sessions", *sys.argv[1:]]),
            "engine": given.engine,
            "weight_bytes": sum(p.stat().st_size for p in graph.parent.glob(graph.name + "*")),
            "modes": found,
            "one_to_own": ratio,
        },
    )


if __name__ == "__main__":
    main()
