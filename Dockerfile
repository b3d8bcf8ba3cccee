# lorakit on CPUs, to train and to serve; docs/release.md has the commands.
FROM python:3.13-slim

# torch of the CPU: PyPI's brings gigabytes of CUDA.
RUN pip install --no-cache-dir uv && uv pip install --system --no-cache --torch-backend cpu torch==2.13.0

WORKDIR /build
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir -c constraints.txt '.[data,gguf,quantized,serve]'

# Whoever runs it: --user "$(id -u):$(id -g)" leaves files that are theirs, and reads those that
# only they may read, such as the keys of a server.
ENV HOME=/tmp HF_HOME=/files/.huggingface
USER nobody
WORKDIR /files
EXPOSE 8000
ENTRYPOINT ["lorakit"]
CMD ["--help"]
