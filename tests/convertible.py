"""Small networks, one for every structure that conversion has a rule for."""

import numpy as np
import onnxruntime
import torch
from torch import nn
from torch.nn import functional as F

from dynaslim.runtime.extract import extract_segment
from dynaslim.runtime.network_source import NetworkSource
from dynaslim.runtime.variants import segment_variants


def _conv(ins, outs, kernel=3, **given):
    return nn.Sequential(
        nn.Conv2d(ins, outs, kernel, padding=kernel // 2, bias=False, **given),
        nn.BatchNorm2d(outs),
        nn.ReLU(inplace=True),
    )


class Plain(nn.Module):
    """Stem, body, global pool, linear."""

    def __init__(self, *body, features=48, classes=5):
        super().__init__()
        self.stem = _conv(3, 16)
        self.body = nn.Sequential(*body)
        self.head = nn.Linear(features, classes)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Shortcut(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.one, self.two = _conv(width, width), nn.Sequential(*_conv(width, width)[:2])

    def forward(self, x):
        return F.relu(x + self.two(self.one(x)))


class Attention(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 12, 1), nn.Conv2d(12, width, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))


class Dense(nn.Module):
    def __init__(self, width, growth):
        super().__init__()
        self.one, self.two = _conv(width, growth), _conv(width + growth, growth)

    def forward(self, x):
        x = torch.cat([x, self.one(x)], 1)
        return torch.cat([x, self.two(x)], 1)


class Split(nn.Module):
    """Halves of the channels take different branches, as in CSP networks."""

    def __init__(self, width):
        super().__init__()
        self.way = _conv(width // 2, width // 2)

    def forward(self, x):
        one, two = x.chunk(2, 1)
        return torch.cat([one, self.way(two)], 1)


class Shuffle(nn.Module):
    def forward(self, x):
        rows, channels, height, width = x.shape
        x = x.view(rows, 2, channels // 2, height, width).transpose(1, 2)
        return x.reshape(rows, channels, height, width)


class Scaled(nn.Module):
    """A ConvNeXt block: depthwise, layer norm over channels, an MLP, a learnt scale."""

    def __init__(self, width):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class Flattened(nn.Module):
    """Channels and pixels flattened into a linear layer, as in VGG."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(_conv(3, 16), _conv(16, 32, stride=2), nn.AdaptiveAvgPool2d(4))
        self.head = nn.Sequential(nn.Linear(512, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 5))

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class Padded(nn.Module):
    """A shortcut that is padded with channels of zeros."""

    def __init__(self):
        super().__init__()
        self.body = _conv(16, 48)

    def forward(self, x):
        return F.pad(x, (0, 0, 0, 0, 16, 16)) + self.body(x)


class Heads(nn.Module):
    """Self-attention over pixels; its channels cannot be cut."""

    def __init__(self, width, fused=False):
        super().__init__()
        self.fused = fused
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x):
        rows, channels, height, width = x.shape
        q, k, v = self.qkv(x).reshape(rows, 3, channels, -1).unbind(1)
        if self.fused:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        else:
            a = (q.transpose(1, 2) @ k * channels**-0.5).softmax(-1)
            y = v @ a.transpose(1, 2)
        return x + self.out(y.reshape(rows, channels, height, width))


class Sized(nn.Module):
    """Padding and interpolation that depend on the image size, as in TensorFlow's "same"."""

    def __init__(self, width):
        super().__init__()
        self.down, self.out = nn.Conv2d(width, width, 3, 2), nn.Conv2d(width, width, 1)

    def forward(self, x):
        sides = x.shape[2:]
        pads = [max(0, (-(-side // 2) - 1) * 2 + 3 - side) for side in sides]
        y = self.down(F.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0], 0)))
        return x + self.out(F.interpolate(y, size=sides, mode="bilinear"))


class Mixer(nn.Module):
    """A linear layer over pixels, the same for every channel."""

    def __init__(self, width, pixels):
        super().__init__()
        self.tokens, self.out = nn.Linear(pixels, pixels), nn.Conv2d(width, width, 1)

    def forward(self, x):
        return x + self.out(self.tokens(x.flatten(2)).reshape(x.shape))


class Folded(nn.Module):
    """Channels and rows of the batch on one axis, pixels in patches, as in MobileViT."""

    def __init__(self, width):
        super().__init__()
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x):
        rows, channels, height, width = x.shape
        y = x.reshape(rows * channels * height // 2, 2, width // 2, 2).transpose(1, 2)
        y = torch.tanh(y.reshape(rows, channels, height * width // 4, 4)) * 2
        y = y.reshape(rows * channels * height // 2, width // 2, 2, 2).transpose(1, 2)
        return x + self.out(y.reshape(rows, channels, height, width))


class Cascade(nn.Module):
    """Halves of the channels, the second with the attention of the first added to it."""

    def __init__(self, width):
        super().__init__()
        self.one, self.two = Heads(width // 2), _conv(width // 2, width // 2)

    def forward(self, x):
        one, two = x.chunk(2, 1)
        one = self.one(one) - one
        return torch.cat([one, self.two(two + one)], 1)


class Windows(nn.Module):
    """A shifted image with a mask that is filled in place, and a permutation of its rows."""

    def __init__(self, width):
        super().__init__()
        self.out = nn.Conv2d(width, width, 1)
        self.register_buffer("order", torch.tensor([3, 1, 0, 2, 7, 6, 5, 4]))

    def forward(self, x):
        mask = x.new_zeros((8, 8))
        for part in (slice(0, 4), slice(4, None)):
            mask[part, 2:] = 1.5
        with torch.autocast(x.device.type, enabled=False):
            x = torch.roll(x, (1, 1), (2, 3))[:, :, self.order]
            return x + self.out(x * mask)


class Reordered(nn.Module):
    """Columns and channels in a learnt order, as in CondenseNet."""

    def __init__(self, width):
        super().__init__()
        order = torch.Generator().manual_seed(0)
        self.register_buffer("columns", torch.randperm(8, generator=order))
        self.register_buffer("channels", torch.randint(width, (width,), generator=order))

    def forward(self, x):
        return x.index_select(3, self.columns).index_select(1, self.channels)


class Repeated(nn.Module):
    """Means of an image, repeated for each of its four windows, as in GCViT."""

    def __init__(self, width):
        super().__init__()
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x):
        rows, channels, height, width = x.shape
        y = x.reshape(rows, channels, 2, height // 2, 2, width // 2).permute(0, 2, 4, 1, 3, 5)
        y = y.reshape(rows * 4, channels, height // 2, width // 2)
        y = torch.tanh(y + x.mean((2, 3), keepdim=True).repeat_interleave(4, 0).type_as(y))
        y = y.reshape(rows, 2, 2, channels, height // 2, width // 2).permute(0, 3, 1, 4, 2, 5)
        return x + self.out(y.reshape(x.shape))


class Token(nn.Module):
    """A class token among the pixels."""

    def __init__(self, width):
        super().__init__()
        self.token, self.out = nn.Parameter(torch.randn(1, 1, width)), nn.Linear(width, width)

    def forward(self, x):
        y = torch.cat([self.token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        y = self.out(y + y.mean(1, keepdim=True))
        return y[:, 1:].transpose(1, 2).reshape(x.shape)


class Branches(nn.Module):
    """Feature maps of several sizes from the image to the classifier."""

    def __init__(self, number):
        super().__init__()
        self.stems = nn.ModuleList(_conv(3, 16, stride=n % 2 + 1) for n in range(number))
        self.bodies = nn.ModuleList(_conv(16, 48) for _ in range(number))
        self.head = nn.Linear(48 * number, 5)

    def forward(self, x):
        maps = [stem(x) for stem in self.stems]
        maps = [body(x).mean((2, 3)) for body, x in zip(self.bodies, maps, strict=True)]
        return self.head(torch.cat(maps, 1))


class Channels(nn.Module):
    """Two linear layers on the channels of tokens, with a shortcut."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, 64),
            nn.Linear(64, width),
        )

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x + x.mean(1, keepdim=True)))))


class Tokens(nn.Module):
    """Patches of an image and a class token."""

    def __init__(self, width):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.layers = nn.Sequential(*(Channels(width) for _ in range(3)))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.layers(x)[:, 0])


NETWORKS = {
    "branches": lambda: Branches(2),
    "tokens": lambda: Tokens(48),
    "sized": lambda: Plain(_conv(16, 48, stride=2), Sized(48), _conv(48, 48)),
    "mixer": lambda: Plain(_conv(16, 48, stride=2), Mixer(48, 64), _conv(48, 48)),
    "folded": lambda: Plain(_conv(16, 48, stride=2), Folded(48), _conv(48, 48)),
    "cascade": lambda: Plain(_conv(16, 48, stride=2), Cascade(48), _conv(48, 48)),
    "windows": lambda: Plain(_conv(16, 48, stride=2), Windows(48), _conv(48, 48)),
    "reordered": lambda: Plain(_conv(16, 48, stride=2), Reordered(48), _conv(48, 48)),
    "repeated": lambda: Plain(_conv(16, 48, stride=2), Repeated(48), _conv(48, 48)),
    "token": lambda: Plain(_conv(16, 48, stride=2), Token(48), _conv(48, 48)),
    "residual": lambda: Plain(_conv(16, 48, stride=2), Shortcut(48), Shortcut(48)),
    "attention": lambda: Plain(_conv(16, 48, stride=2), Attention(48), Shortcut(48)),
    "dense": lambda: Plain(_conv(16, 24, stride=2), Dense(24, 12)),
    "split": lambda: Plain(_conv(16, 48, stride=2), Split(48), _conv(48, 48)),
    "shuffle": lambda: Plain(_conv(16, 48), _conv(48, 48, groups=2), Shuffle(), _conv(48, 48)),
    "grouped": lambda: Plain(_conv(16, 48, stride=2), _conv(48, 48, groups=12), _conv(48, 48)),
    "scaled": lambda: Plain(_conv(16, 48, stride=2), Scaled(48), Scaled(48)),
    "flattened": Flattened,
    "standardised": lambda: Plain(
        _conv(16, 32, stride=2), Standardised(32, 48, 3), nn.GroupNorm(4, 48), nn.ReLU()
    ),
    "padded": lambda: Plain(Padded(), _conv(48, 48, stride=2)),
    "heads": lambda: Plain(_conv(16, 32, stride=2), Heads(32), _conv(32, 48)),
    "fused": lambda: Plain(_conv(16, 32, stride=2), Heads(32, fused=True), _conv(32, 48)),
    "upsampled": lambda: Plain(
        _conv(16, 48, stride=2), nn.Upsample(scale_factor=2), _conv(48, 48), nn.MaxPool2d(2)
    ),
    "parametric": lambda: Plain(
        nn.Conv2d(16, 48, 3), nn.PReLU(48), nn.ConvTranspose2d(48, 48, 2, 2), nn.Hardswish()
    ),
}


def trained(name, images=None):
    """A network in evaluation mode, with BN statistics of some images."""
    torch.manual_seed(0)
    net = NETWORKS[name]().train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    with torch.no_grad():
        net(torch.randn(16, 3, 16, 16) if images is None else images)
    return net.eval()


def routed_alone(net, x):
    """The choices of a network's only gate for some images, and the answer to each image alone."""
    with torch.no_grad():
        chosen = net.segment(0, x, 0).gate_logits.argmax(1).tolist()
        rows = [net(x[i : i + 1], net.spec.routes[k])[0] for i, k in enumerate(chosen)]
    return chosen, torch.stack(rows)


@torch.no_grad()
def assert_segments_agree(net, x):
    """Assert that all variants give equal results in the network, extracted and as ONNX."""
    source, features = NetworkSource(net), {(-1, 0): x}
    for form in segment_variants(net.spec):
        into = features[form.segment - 1, form.before]
        expected = net.segment(form.segment, into, form.choice)
        features.setdefault((form.segment, form.choice), expected.features)
        made = extract_segment(net, *form[:3])(into)
        session = onnxruntime.InferenceSession(source.onnx(form))
        by_onnx = session.run(None, {"x": into.numpy()})
        if form.segment == net.spec.num_segments - 1:
            expected, made = expected[:1], (made,)
        for want, got, onnx in zip(expected, made, by_onnx, strict=True):
            near = 5e-5 * float(want.abs().max())
            assert float((got - want).abs().max()) < near
            assert np.abs(onnx - want.numpy()).max() < near
