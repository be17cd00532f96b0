"""Compare one session per batch size with one session for all, on ONNX Runtime's CPU provider.

A server's batch size changes from call to call. For batch sizes 1 … 8 of one U-Net, with a process for each mode, this
measures resident memory after each batch size was run, and the CPU seconds to create its session and to call it:

- `own`: a session for each batch size, which is fixed, with a separate copy of the weights;
- `shared`: the same with one copy of the weights for all sessions (`SessionOptions.add_initializer`);
- `shared, not packed`: the same without packed copies of the weights by kernels;
- `packed once`: a session for each batch size, of a graph that was saved with its packed weights
  (`session.save_external_prepacked_constant_initializers`), whose file all sessions map;
- `one`: one session with a dynamic batch size, as in `OrtNetwork`.

ONNX Runtime's container for sharing packed weights between sessions is not in its Python interface.

The load of the machine differs between processes that run one after the other, so calls of `one` and `own` are also
timed alternately in one process: `one_to_own` is the ratio of their median CPU seconds, by batch size.

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
#: program that measures one mode
PROGRAM = """
import gc, json, sys, tempfile, time
from pathlib import Path
import numpy as np, onnx, onnxruntime as ort, psutil
from onnx import external_data_helper, numpy_helper
graph, mode, most = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
shared = {}
if mode == "packed once":
    # in a folder that is deleted with the process; the measured sessions load the graph saved here
    folder = tempfile.TemporaryDirectory()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.optimized_model_filepath = str(Path(folder.name) / "saved.onnx")
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
process, sessions, rows = psutil.Process(), [], []
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
    created = time.process_time() - started
    kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    feed = {i.name: np.ones([d if isinstance(d, int) else batch for d in i.shape], kinds[i.type])
            for i in session.get_inputs()}
    calls = []
    for _ in range(4):
        started = time.process_time()
        session.run(None, feed)
        calls.append(time.process_time() - started)
    sessions.append(session)
    rows.append({"batch": batch, "resident_bytes": process.memory_info().rss - base, "made_s": created,
                 "call_s": sorted(calls[1:])[1]})
print(json.dumps(rows))
"""
#: program that times both kinds of session alternately in one process
RATIO = """
import json, sys, time
import numpy as np, onnxruntime as ort
graph, ratios = sys.argv[1], {}
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
        for name, timed in pair.items():
            started = time.thread_time()
            timed.run(None, feed)
            times[name].append(time.thread_time() - started)
    ratios[batch] = float(np.median(times["one"][1:]) / np.median(times["own"][1:]))
print(json.dumps(ratios))
"""


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="emoji-tiny")
    parser.add_argument("--out", type=Path, default=RESULTS / "serving-sessions-emoji.json")
    options = parser.parse_args()
    graph = open_bundle(options.engine).file("unet")
    modes = {}
    for mode in MODES:
        command = [sys.executable, "-c", PROGRAM, str(graph), mode, str(BATCHES)]
        modes[mode] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        print(mode, [round(each["resident_bytes"] / 2**20) for each in modes[mode]], "MiB", flush=True)
    command = [sys.executable, "-c", RATIO, str(graph)]
    ratio = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    print("one to own", {batch: round(value, 3) for batch, value in ratio.items()}, flush=True)
    write_json(
        options.out,
        {
            "schema": "pnp-trt/serving-sessions/1",
            "provenance": provenance(["python", "-m", "benchmarks.serving_sessions", *sys.argv[1:]]),
            "engine": options.engine,
            "weight_bytes": sum(p.stat().st_size for p in graph.parent.glob(graph.name + "*")),
            "modes": modes,
            "one_to_own": ratio,
        },
    )


if __name__ == "__main__":
    main()
