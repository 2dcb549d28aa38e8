#!/bin/sh
# All that only a GPU can show, in one go: the suite, the sanitizers, the layer beside its baselines, tiles, training,
# generation.
#
#     sh benchmarks/gpu/all.sh FOLDER COMMIT [PART ...]     parts: tests sanitize layer launches tiles training overlap
#     generation (default: all)
#
# For a machine with its own torch and triton and nothing installed; FOLDER gets logs, CSVs and pictures. Each part has a
# limit of its own, and a part that fails does not stop the next one.
set -u
out=$1 commit=$2
shift 2
mkdir -p "$out"
export PYTHONPATH=src PYTHONUNBUFFERED=1 COLUMNS=150
bench="python3 -W ignore -m zemoe bench --commit $commit"

for part in ${*:-tests sanitize layer launches tiles training overlap generation}; do
    echo "== $part"
    case $part in
    tests)
        timeout 200 make test-gpu PYTHON=python3 > "$out/tests.log" 2>&1
        grep -E "passed|failed|^FAILED|^ERROR" "$out/tests.log"
        ;;
    sanitize)
        timeout 60 python3 benchmarks/gpu/sanitize.py > "$out/sanitize.log" 2>&1
        for tool in memcheck racecheck; do
            timeout 150 compute-sanitizer --tool $tool --error-exitcode 1 python3 benchmarks/gpu/sanitize.py \
                > "$out/$tool.log" 2>&1 &
        done
        wait
        grep -H "SUMMARY" "$out/memcheck.log" "$out/racecheck.log"
        ;;
    layer)
        timeout 150 $bench research lite --tokens 1,8,64,512,1024,4096,16384 --baseline grouped,torch,eager \
            --repeats 11 --csv "$out/layer.csv" --plot "$out/layer.png"
        timeout 60 $bench research --tokens 16384 --zero-share 0.33,0,0.5,0.9 --baseline grouped --repeats 11 \
            --csv "$out/zero_share.csv" --plot "$out/zero_share.png"
        timeout 30 $bench research --tokens 16384 --zero-share 0.75 --baseline none --repeats 11 --csv "$out/even.csv"
        timeout 30 $bench research --tokens 16384 --zero-share 0.75 --skew 0.3 --baseline none --repeats 11 \
            --csv "$out/skew.csv"
        timeout 120 $bench flash --tokens 1,16,1024,8192 --baseline grouped,torch --repeats 7 --csv "$out/flash.csv"
        ;;
    launches)
        timeout 60 python3 -W ignore benchmarks/gpu/launches.py lite:1,8,64,512,1024,4096,16384 \
            research:1,64,512,4096,16384 --commit "$commit" --output "$out"
        ;;
    tiles)
        timeout 120 python3 -W ignore benchmarks/gpu/tiles.py lite:8 lite:64 lite:512 lite:1024 lite:4096 lite:16384 \
            research:4096 research:16384 --commit "$commit" --output "$out"
        ;;
    training)
        timeout 150 python3 -W ignore benchmarks/gpu/training.py --commit "$commit" --output "$out" > "$out/training.log" 2>&1
        grep -v "^checked\|chosen False" "$out/training.log"
        ;;
    overlap)
        timeout 120 python3 -W ignore benchmarks/gpu/overlap.py --commit "$commit" --output "$out"
        ;;
    generation)
        timeout 540 python3 -W ignore benchmarks/gpu/generation.py --commit "$commit" --output "$out/generation.csv"
        ;;
    *) echo "unknown part" && exit 2 ;;
    esac
done
