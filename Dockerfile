# For a CUDA machine: the toolkit on vLLM's own image, whose torch, transformers and vLLM stay as they are.
# Nobody has built this image yet: it is neither part of `make test` nor of the workflow.
#
#   docker build -t mpd .
#   docker run --gpus all --ipc host -v "$PWD:/work" -v "$HOME/.cache/huggingface:/root/.cache/huggingface" \
#       mpd mpd-rounds --example pocket --out runs/demo
ARG VLLM=v0.33.0
FROM vllm/vllm-openai:${VLLM}

COPY . /opt/mpd
# pip leaves what fits the bounds; `pip check` says if it had to change what vLLM asks for.
RUN python3 -m pip install --no-cache-dir '/opt/mpd[checkers,hub,lora,openai]' && python3 -m pip check

WORKDIR /work
# The image starts a server otherwise.
ENTRYPOINT []
CMD ["mpd-gen", "--help"]
