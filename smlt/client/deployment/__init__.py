"""Deploying to AWS Lambda: `smlt deploy`, `smlt destroy`, `smlt policy`, and how later commands find a deployment."""
