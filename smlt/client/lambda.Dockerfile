# SMLT's worker for AWS Lambda as a container image, for what is too large for a layer, such as PyTorch. You build it: beside
# this file, dist/ holds smlt's wheels (in a checkout: python release/wheels.py --out dist).
#
#   docker buildx build --platform linux/amd64 --provenance=false --load -t smlt:x86_64 .
#   docker buildx build --platform linux/arm64 --provenance=false --load -t smlt:arm64 .
#
# One image for each architecture: Lambda takes no image index, which is also why there is no provenance.
FROM public.ecr.aws/lambda/python:@PYTHON@

RUN --mount=type=bind,source=dist,target=/dist \
    pip install --no-cache-dir "smlt[worker] @ file://$(ls /dist/smlt-@VERSION@-*manylinux*_"$(uname -m)".whl)"
@MORE@

CMD ["smlt.worker.handler.handler"]
