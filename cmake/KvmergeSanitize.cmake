# Libraries that stop at the first wrong access to memory: AddressSanitizer and the assertions of
# llama.cpp and ggml (but ggml-cpu, see CMakeLists.txt), UndefinedBehaviorSanitizer for the engine too.

if(KVMERGE_SANITIZE)
    if(MSVC)
        message(FATAL_ERROR "KVMERGE_SANITIZE needs gcc or clang")
    endif()
    set(CMAKE_BUILD_TYPE "")
    add_compile_options(-O1 -g1 -fno-omit-frame-pointer -fsanitize=address)
    add_compile_definitions($<$<COMPILE_LANGUAGE:CXX>:_GLIBCXX_ASSERTIONS>)
    add_link_options(-fsanitize=address,undefined)
    set(KVMERGE_SANITIZE_ENGINE -fsanitize=undefined -fno-sanitize-recover=undefined)
endif()
