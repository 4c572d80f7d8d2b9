#!/usr/bin/env bash
# The native CPU tests on modules built with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the sources.
# Needs pybind11, ninja and setuptools beside the test requirements.
#
#   tests/sanitize.sh                          every test of the operations
#   tests/sanitize.sh -k "lengths or masks"    some of them
set -euo pipefail
cd "$(dirname "$0")/.."

copy=build/sanitized
mkdir -p $copy
cp -r setup.py pyproject.toml README.md csrc qvl_kernels tests $copy
cd $copy
rm -f qvl_kernels/*.so
QVL_CXXFLAGS="-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer" \
  python setup.py build_ext --inplace > build.log 2>&1 || { cat build.log; exit 1; }
ls qvl_kernels/_cpu_avx2*.so qvl_kernels/_cpu_avx512*.so # the tests would skip what is not there
# The interpreter is not built with the sanitizer, so its library comes first; Python's own allocations look like leaks.
# torch, OpenMP and libstdc++ as they are: only what our modules do is checked.
export LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libubsan.so) $(${CXX:-g++} -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. PYTHONMALLOC=malloc
python -m pytest -p no:cacheprovider tests/test_attention.py tests/test_attention_gradients.py tests/test_attention_precision.py \
  tests/test_attention_varlen.py tests/test_sparse_attention.py tests/test_linear_attention.py tests/test_linear_attention_gradients.py \
  tests/test_linear_attention_varlen.py tests/test_scaled_dot_product_attention.py tests/test_rms_norm.py \
  tests/test_linear.py tests/test_linear_gradients.py tests/test_append_kv.py tests/test_recording.py tests/test_layer_norm.py \
  tests/test_rotary.py tests/test_norm_rotary.py tests/test_swiglu.py tests/test_gelu_tanh.py "$@"
