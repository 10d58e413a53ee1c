from __future__ import annotations

import functools
import ipaddress
import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dataset_build.addresses import is_public, literal, within

# The IANA IPv4 and IPv6 Special-Purpose Address Registries: block, globally reachable. What they do
# not list is ordinary; None is their "N/A".
REGISTRY: dict[str, bool | None] = {
    "0.0.0.0/8": False,
    "0.0.0.0/32": False,
    "10.0.0.0/8": False,
    "100.64.0.0/10": False,
    "127.0.0.0/8": False,
    "169.254.0.0/16": False,
    "172.16.0.0/12": False,
    "192.0.0.0/24": False,
    "192.0.0.0/29": False,
    "192.0.0.8/32": False,
    "192.0.0.9/32": True,
    "192.0.0.10/32": True,
    "192.0.0.170/32": False,
    "192.0.0.171/32": False,
    "192.0.2.0/24": False,
    "192.31.196.0/24": True,
    "192.52.193.0/24": True,
    "192.88.99.0/24": None,
    "192.168.0.0/16": False,
    "192.175.48.0/24": True,
    "198.18.0.0/15": False,
    "198.51.100.0/24": False,
    "203.0.113.0/24": False,
    "240.0.0.0/4": False,
    "255.255.255.255/32": False,
    "::1/128": False,
    "::/128": False,
    "::ffff:0:0/96": False,
    "64:ff9b::/96": True,
    "64:ff9b:1::/48": False,
    "100::/64": False,
    "100:0:0:1::/64": False,
    "2001::/23": False,
    "2001::/32": None,
    "2001:1::1/128": True,
    "2001:1::2/128": True,
    "2001:1::3/128": True,
    "2001:2::/48": False,
    "2001:3::/32": True,
    "2001:4:112::/48": True,
    "2001:10::/28": None,
    "2001:20::/28": True,
    "2001:30::/28": True,
    "2001:db8::/32": False,
    "2002::/16": None,
    "2620:4f:8000::/48": True,
    "3fff::/20": False,
    "5f00::/16": False,
    "fc00::/7": False,
    "fe80::/10": False,
}
# Where we decide otherwise than "globally reachable unless the registry says no", and why.
STRICTER = {
    "192.0.0.9/32": "an anycast service of the access network, no web server",
    "192.0.0.10/32": "the same",
    "192.88.99.0/24": "6to4 relays: N/A in the registry, withdrawn by RFC 7526",
    "224.0.0.0/4": "multicast, which has a registry of its own",
    "::/3": "IANA has opened 2000::/3 alone for allocation; NAT64 goes by the address in it",
    "2001::/23": "protocols and overlays (Teredo, ORCHID, AMT, anycast), no web servers",
    "2002::/16": "6to4: N/A in the registry; leads to the IPv4 address in it",
    "3ffe::/16": "the 6bone's, handed back (RFC 3701)",
    "4000::/2": "not opened for allocation",
    "8000::/1": "not opened for allocation; multicast and what was site-local lie here",
}
MAPPED, NAT64 = "::ffff:0:0/96", "64:ff9b::/96"  # both go by the IPv4 address in them


@functools.cache
def network(block: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(block)


def longest(table: dict[str, Any], number: ipaddress.IPv4Address | ipaddress.IPv6Address) -> Any:
    """The table's entry for the longest block that holds an address."""
    holding = [block for block in table if number in network(block)]
    return table[max(holding, key=lambda block: network(block).prefixlen)] if holding else None


def expected(number: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    for embedding in (MAPPED, NAT64):
        if number in network(embedding):
            return expected(ipaddress.IPv4Address(int(number) & 0xFFFFFFFF))
    return longest(REGISTRY, number) is not False and longest(STRICTER, number) is None


@functools.cache
def sampled() -> set[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Both ends of every block, their neighbours outside, and addresses drawn in and around it."""
    generator = random.Random(6890)
    numbers: set[ipaddress.IPv4Address | ipaddress.IPv6Address] = set()
    for block in map(ipaddress.ip_network, [*REGISTRY, *STRICTER, "2000::/3", "0.0.0.0/0"]):
        first, last = int(block[0]), int(block[-1])
        drawn = [first - 1, first, first + 1, last - 1, last, last + 1]
        drawn += [generator.randint(first, last) for _ in range(150)]
        drawn += [first ^ (1 << bit) for bit in range(block.max_prefixlen)]
        make = ipaddress.IPv4Address if block.version == 4 else ipaddress.IPv6Address
        numbers |= {make(n) for n in drawn if 0 <= n < 1 << block.max_prefixlen}
    for _ in range(2000):
        numbers.add(ipaddress.IPv4Address(generator.getrandbits(32)))
        numbers.add(ipaddress.IPv6Address(generator.getrandbits(128)))
        numbers.add(ipaddress.IPv6Address(1 << 125 | generator.getrandbits(125)))
    return numbers


def test_the_table_agrees_with_the_registries() -> None:
    numbers = sampled()
    assert len(numbers) >= 10_000
    public = {number for number in numbers if expected(number)}
    assert 3000 < len(public) < len(numbers) - 3000
    assert {number for number in numbers if is_public(str(number))} == public


def test_every_difference_from_the_registries_is_a_difference() -> None:
    """Each stricter block holds addresses that the registry would let pass."""
    for block in STRICTER:
        drawn = [number for number in sampled() if number in network(block)]
        assert any(longest(REGISTRY, number) is not False for number in drawn), block


def test_an_isatap_interface_hides_an_ipv4_address() -> None:
    for form in ("2400:cb00::5efe:c0a8:1", "2400:cb00::200:5efe:127.0.0.1"):
        assert not is_public(form)
    assert is_public("2400:cb00::1:5efe:c0a8:1")


def test_networks_that_are_let_in() -> None:
    networks = [ipaddress.ip_network(block) for block in ("127.0.0.0/8", "fd00::/8")]
    for inside in ("127.0.0.1", "127.255.255.255", "fd00::1"):
        assert within(inside, networks)
    for outside in ("128.0.0.0", "::1", "::ffff:127.0.0.1", "localhost", ""):
        assert not within(outside, networks)


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
