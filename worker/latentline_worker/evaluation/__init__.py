"""`latentline evaluate`: what a model draws, measured on prompts whose combinations no training picture has."""
