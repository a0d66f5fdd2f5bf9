"""Where bytes come from: directories of safetensors, their headers, checked before anything is believed."""
