"""Which addresses a download may connect to: public unicast, decided on the number itself.

The tables restate the IANA IPv4 and IPv6 Special-Purpose Address Registries (RFC 6890 and its
successors). `ipaddress.is_global` is not used: it calls multicast, NAT64 forms of private addresses
and (before Python 3.13) 6to4 global.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence

_IPV4_REFUSED = tuple(
    ipaddress.IPv4Network(block)
    for block in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier-grade NAT
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local; cloud metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relay
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, limited broadcast
    )
)
_IPV6_UNICAST = ipaddress.IPv6Network("2000::/3")  # all that IANA has opened for allocation
_IPV6_REFUSED = tuple(
    ipaddress.IPv6Network(block)
    for block in (
        "2001::/23",  # protocol assignments; Teredo (2001::/32) hides an IPv4 address
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4 hides an IPv4 address
        "3ffe::/16",  # returned by the 6bone, never allocated again
        "3fff::/20",  # documentation
    )
)
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # the way to IPv4 on an IPv6-only network
_ISATAP = 0x5EFE  # interface identifier before an IPv4 address, RFC 5214; 0x0200 marks it global
_NUMERIC = re.compile(r"[0-9a-fx.]+", re.IGNORECASE)


def is_public(address: str) -> bool:
    """Whether a numeric IPv4 or IPv6 address (a zone after `%` is ignored) is public unicast.

    A mapped or NAT64 address is what the IPv4 address in it is. Anything unreadable is not public.
    """
    try:
        number = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(number, ipaddress.IPv6Address):
        if number not in _MAPPED and number not in _NAT64:
            hides_ipv4 = int(number) >> 32 & 0xFDFFFFFF == _ISATAP
            refused = hides_ipv4 or any(number in block for block in _IPV6_REFUSED)
            return number in _IPV6_UNICAST and not refused
        number = ipaddress.IPv4Address(int(number) & 0xFFFFFFFF)
    return not any(number in block for block in _IPV4_REFUSED)


def within(address: str, networks: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> bool:
    """Whether a numeric address lies in one of the networks; anything unreadable does not."""
    try:
        number = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(number in network for network in networks)


def literal(host: str) -> str | None:
    """The address that a URL's host spells, or None if it is a name.

    Reads what resolvers read: brackets, and IPv4 in one to four decimal, octal or hexadecimal
    parts (`2130706433`, `0x7f.1`, `0177.0.0.1`).
    """
    bare = host.strip("[]").partition("%")[0]
    if ":" in bare:
        try:
            return str(ipaddress.IPv6Address(bare))
        except ValueError:
            return None
    if not _NUMERIC.fullmatch(bare) or not bare[0].isdigit():
        return None
    try:
        return socket.inet_ntoa(socket.inet_aton(bare.rstrip(".")))
    except OSError:
        return None
