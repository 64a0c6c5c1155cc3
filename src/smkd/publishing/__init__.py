"""Export of backbones: timm, safetensors, ONNX, PyTorch programs and the Hugging Face Hub."""
