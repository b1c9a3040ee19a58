#include "kvmerge-fetch.h"

#include "common.h"
#include "http.h" // the system's headers of sockets too

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <stdexcept>

#ifdef _WIN32
#include <ws2tcpip.h>
#else
#include <netdb.h>
#endif

static constexpr int N_REDIRECTS = 3;

//
// addresses
//

// IPv4, in the host's order: not of this machine, a private network, a link, a test or a multicast (IANA's special-purpose registry)
static bool is_public(uint32_t ip) {
    static const struct {
        uint32_t ip;
        int      n_bits;
    } special[] = {
        { 0x00000000,  8 }, { 0x0a000000,  8 }, { 0x64400000, 10 }, { 0x7f000000,  8 }, { 0xa9fe0000, 16 }, { 0xac100000, 12 },
        { 0xc0000000, 24 }, { 0xc0000200, 24 }, { 0xc0586300, 24 }, { 0xc0a80000, 16 }, { 0xc6120000, 15 }, { 0xc6336400, 24 },
        { 0xcb007100, 24 }, { 0xe0000000,  3 },
    };

    for (const auto & range : special) {
        if ((ip ^ range.ip) >> (32 - range.n_bits) == 0) {
            return false;
        }
    }

    return true;
}

// IPv6: only what is routed everywhere, which is 2000::/3, and of it nothing that carries or hides another address
static bool is_public(const uint8_t * ip) {
    const auto begins = [&](std::initializer_list<uint8_t> prefix) { return std::equal(prefix.begin(), prefix.end(), ip); };

    return ip[0] >> 5 == 1 && !begins({ 0x20, 0x01, 0x00 }) && !begins({ 0x20, 0x01, 0x01 }) && !begins({ 0x20, 0x01, 0x0d, 0xb8 }) &&
            !begins({ 0x20, 0x02 }) && !begins({ 0x3f, 0xff });
}

static bool is_public(const sockaddr * address) {
    if (address->sa_family == AF_INET) {
        return is_public(ntohl(reinterpret_cast<const sockaddr_in *>(address)->sin_addr.s_addr));
    }

    return address->sa_family == AF_INET6 && is_public(reinterpret_cast<const sockaddr_in6 *>(address)->sin6_addr.s6_addr);
}

// The address of a host, as text. It is what is connected to: asked once more, the name may stand for another.
static std::string resolve(const std::string & host, bool is_any) {
    addrinfo   hints = {};
    addrinfo * found = nullptr;

    hints.ai_socktype = SOCK_STREAM;

    if (getaddrinfo(host.c_str(), nullptr, &hints, &found) != 0 || !found) {
        throw std::invalid_argument("there is no host " + host);
    }

    const std::unique_ptr<addrinfo, void (*)(addrinfo *)> owner(found, freeaddrinfo);

    for (const addrinfo * cur = found; cur; cur = cur->ai_next) {
        if (!is_any && !is_public(cur->ai_addr)) {
            throw std::invalid_argument("it is on this machine or its own network, which --media-url any would allow");
        }
    }

    char text[NI_MAXHOST];
    if (getnameinfo(found->ai_addr, found->ai_addrlen, text, sizeof(text), nullptr, 0, NI_NUMERICHOST) != 0) {
        throw std::invalid_argument("there is no host " + host);
    }

    return text;
}

//
// requests
//

// where a redirect leads
static std::string location(const common_http_url & from, const std::string & to) {
    if (to.find("://") != std::string::npos) {
        return to;
    }
    if (to.rfind("//", 0) == 0) {
        return from.scheme + ":" + to;
    }

    const std::string base = from.scheme + "://" + common_http_format_host(from.host) + ":" + std::to_string(from.port);

    return base + (to.rfind("/", 0) == 0 ? to : from.path.substr(0, from.path.rfind('/') + 1) + to);
}

static std::pair<long, std::vector<char>> fetch(std::string url, const common_remote_params & params, bool is_any) {
    using clock = std::chrono::steady_clock;

    const auto end = clock::now() + std::chrono::seconds(params.timeout);

    for (int i = 0; i <= N_REDIRECTS; ++i) {
        auto [client, parts] = common_http_client(url);

        client.set_follow_location(false);
        client.set_hostname_addr_map({ { parts.host, resolve(parts.host, is_any) } });

        const auto left = std::max<clock::duration>(end - clock::now(), std::chrono::milliseconds(1));

        client.set_connection_timeout(left);
        client.set_read_timeout(left);
        client.set_max_timeout(left); // also of headers that trickle

        std::vector<char> data;
        const char * why = "it does not answer";

        const auto res = client.Get(parts.path, [&](const char * piece, size_t n) {
            data.insert(data.end(), piece, piece + n);

            if ((int64_t) data.size() > params.max_size) {
                why = "it is too large";
                return false;
            }
            if (clock::now() > end) {
                why = "it takes too long";
                return false;
            }
            return true;
        });

        if (!res) {
            throw std::invalid_argument(why);
        }
        if (res->status < 300 || res->status >= 400) {
            if (res->status < 200 || res->status >= 300) {
                throw std::invalid_argument("the answer is HTTP " + std::to_string(res->status));
            }
            return { res->status, std::move(data) };
        }

        url = location(parts, res->get_header_value("Location"));
    }

    throw std::invalid_argument("it leads on to more than " + std::to_string(N_REDIRECTS) + " other places");
}

std::pair<long, std::vector<char>> kvmerge_server_fetch(const std::string & url, const common_remote_params & params) {
    const char * which = getenv("LLAMA_ARG_MEDIA_URL");

    if (!which) {
        return common_remote_get_content(url, params);
    }

    const bool is_any = strcmp(which, "any") == 0;

    try {
        if (!is_any && strcmp(which, "public") != 0) {
            throw std::invalid_argument("--media-url allows none, send it as data");
        }
        return fetch(url, params, is_any);
    } catch (const std::exception & e) {
        throw std::invalid_argument("the URL " + url.substr(0, 200) + " was not fetched: " + e.what());
    }
}
