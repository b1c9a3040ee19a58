# Stands before CMake's own module of this name on the module path, because ggml/src/CMakeLists.txt
# includes it first thing: the one way to act inside that scope, where the functions that define a
# CPU variant work, without a change of upstream's file.

include("${CMAKE_ROOT}/Modules/CheckCXXCompilerFlag.cmake")

if(CMAKE_CURRENT_SOURCE_DIR MATCHES "/ggml/src$" AND NOT DEFINED kvmerge_ggml_begun)
    set(kvmerge_ggml_begun ON)
    set_property(GLOBAL PROPERTY KVMERGE_GGML_BEGUN ON)
    if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
        kvmerge_ggml_begin(ARM)
    else()
        kvmerge_ggml_begin(x86)
    endif()
endif()
