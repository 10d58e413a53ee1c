from __future__ import annotations

import ipaddress
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_build.download.addresses import is_public, literal

# The IANA special-purpose registries (and multicast), as RFC 6890 and its updates list them.
SPECIAL = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
    "255.255.255.255/32",
    "::1/128",
    "::/128",
    "64:ff9b:1::/48",
    "100::/64",
    "100:0:0:1::/64",
    "2001::/23",
    "2001::/32",
    "2001:2::/48",
    "2001:db8::/32",
    "2002::/16",
    "3fff::/20",
    "5f00::/16",
    "fc00::/7",
    "fe80::/10",
    "fec0::/10",
    "ff00::/8",
]


@pytest.mark.parametrize("block", SPECIAL)
def test_special_blocks_are_refused_from_end_to_end(block: str) -> None:
    network = ipaddress.ip_network(block)
    generator = random.Random(block)
    size = network.num_addresses
    for offset in {0, size - 1, *(generator.randrange(size) for _ in range(300))}:
        assert not is_public(str(network[offset]))


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "9.255.255.255", "11.0.0.0", "100.63.255.255", "172.32.0.0"]
)
def test_neighbours_of_special_blocks_are_public(address: str) -> None:
    assert is_public(address)


@given(st.ip_addresses(v=4))
def test_ipv4_agrees_with_the_standard_library_but_for_multicast(
    address: ipaddress.IPv4Address,
) -> None:
    relay = address in ipaddress.ip_network("192.88.99.0/24")
    assignments = address in ipaddress.ip_network("192.0.0.0/24")
    expected = address.is_global and not address.is_multicast and not relay and not assignments
    assert is_public(str(address)) == expected


@given(st.ip_addresses(v=6))
def test_no_ipv6_is_public_that_the_standard_library_calls_private(
    address: ipaddress.IPv6Address,
) -> None:
    if is_public(str(address)):
        assert address.is_global
        assert not address.is_multicast


@given(st.ip_addresses(v=4))
def test_an_embedded_ipv4_address_decides(inner: ipaddress.IPv4Address) -> None:
    for prefix in ("::ffff:0:0", "64:ff9b::"):
        outer = ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) | int(inner))
        assert is_public(str(outer)) == is_public(str(inner))
    compatible = ipaddress.IPv6Address(int(inner))
    six_to_four = ipaddress.IPv6Address((0x2002 << 112) | (int(inner) << 80))
    teredo = ipaddress.IPv6Address((0x20010000 << 96) | (int(inner) ^ 0xFFFFFFFF))
    assert not any(is_public(str(form)) for form in (compatible, six_to_four, teredo))


def test_zones_and_rubbish() -> None:
    assert not is_public("fe80::1%eth0")
    assert not is_public("")
    assert not is_public("example.org")


@given(st.ip_addresses(v=4))
def test_every_spelling_of_an_ipv4_address_is_read(address: ipaddress.IPv4Address) -> None:
    number, (a, b, c, d) = int(address), address.packed
    spellings = [
        str(number),
        hex(number),
        oct(number).replace("0o", "0"),
        f"{a}.{number & 0xFFFFFF}",
        f"{a:#x}.{b:#x}.{c << 8 | d}",
        f"0{a:o}.{b}.{c:#X}.{d}",
        f"{address}.",
    ]
    assert {literal(spelling) for spelling in spellings} == {str(address)}


def test_names_are_not_literals() -> None:
    for name in (
        "example.org",
        "1e100.net",
        "3com.com",
        "dead.beef",
        "a",
        "123.example",
        "1.2.3.x",
    ):
        assert literal(name) is None
    assert literal("[::ffff:7f00:1]") == "::ffff:7f00:1"
    assert literal("[fe80::1%25eth0]") == "fe80::1"
