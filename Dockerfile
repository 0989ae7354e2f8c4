# A server of an exported package: ONNX Runtime and no torch. See docs/deploy.md.
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY dynaslim dynaslim
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
COPY constraints.txt /wheels/
COPY --from=build /wheels/*.whl /wheels/
# what serving a package needs of the dependencies, which bring torch
RUN pip install --no-cache-dir --constraint /wheels/constraints.txt \
        numpy msgspec pillow "jsonargparse[signatures]" rich pyyaml filelock \
        onnxruntime fastapi uvicorn python-multipart prometheus-client \
    && pip install --no-cache-dir --no-deps /wheels/*.whl \
    && useradd --system --uid 10001 --create-home dynaslim \
    && install --directory --owner=dynaslim /cache
USER 10001
ENV DYNASLIM_CACHE=/cache PYTHONUNBUFFERED=1
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz')"]
ENTRYPOINT ["dynaslim"]
CMD ["serve", "/package", "--host", "0.0.0.0"]
