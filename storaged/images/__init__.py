"""Works on images by qemu-img: creates, converts, checks them, and so on, on every source that can be attached."""
