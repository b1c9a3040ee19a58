#pragma once

// Media that a message names by an http:// URL: which are fetched, and how much of them.

#include "download.h"

#include <string>
#include <utility>
#include <vector>

// In the place of common_remote_get_content(). The environment says what is allowed (LLAMA_ARG_MEDIA_URL): "none"; "public",
// addresses that everyone can reach; or "any", this machine and its network too. Where it says nothing, all is as upstream. Throws std::invalid_argument that names the URL and the reason where it is not
// allowed or not to be had. Each address that is asked, redirects included, is looked at before it is connected to; params
// says how large the answer may be, and how long all of it may take.
std::pair<long, std::vector<char>> kvmerge_server_fetch(const std::string & url, const common_remote_params & params);
