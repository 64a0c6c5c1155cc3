"""Taking a backbone elsewhere: timm, safetensors, ONNX, PyTorch programs and the Hugging Face Hub."""
