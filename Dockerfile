# docker build -t sentencekv-vllm .
# docker run --gpus all -p 8000:8000 sentencekv-vllm MODEL
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

FROM python:3.12-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${VLLM_IMAGE}
# The image's vLLM and torch stay as they are: the base requirements name neither.
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir /wheels/*.whl && rm -r /wheels

# Outside the source: a folder named triton_kernels would take the name of Triton's package.
RUN useradd --create-home --uid 1000 sentencekv
USER 1000
WORKDIR /home/sentencekv
ENV HF_HOME=/home/sentencekv/.cache/huggingface \
    SENTENCEKV_CACHE_DIR=/home/sentencekv/.cache/sentencekv_vllm
# Compiled now, so that no server waits for nvcc at its start.
RUN python3 -c "from sentencekv_vllm.ops.cuda_build import build_cuda; print(build_cuda())"

EXPOSE 8000
# Our option comes last: the model, as vLLM wants it, first.
ENTRYPOINT ["/bin/sh", "-c", "exec vllm serve \"$@\" --attention-backend sentencekv", "sh"]
CMD ["--help"]
