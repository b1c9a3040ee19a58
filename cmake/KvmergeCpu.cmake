# Which instruction sets the CPU backend is built for.
#
# On Linux the backend is a module that is chosen when it is loaded: `ggml-cpu`, for any machine of
# the architecture, and a few variants of it. Upstream can build all the variants it knows (14 on
# x86-64); here only those with a real gain are built, and none with AMX, because a machine may
# announce AMX and still kill the process that uses it. Elsewhere the backend is linked in.
#
# The rows repeat upstream's (ggml/src/CMakeLists.txt): a name and the features it stands for.

set(KVMERGE_CPU_x86_haswell     SSE42 AVX F16C FMA AVX2 BMI2)
set(KVMERGE_CPU_x86_skylakex    ${KVMERGE_CPU_x86_haswell} AVX512)
set(KVMERGE_CPU_x86_icelake     ${KVMERGE_CPU_x86_skylakex} AVX512_VBMI AVX512_VNNI)
set(KVMERGE_CPU_x86_zen4        ${KVMERGE_CPU_x86_icelake} AVX512_BF16)
set(KVMERGE_CPU_x86_alderlake   ${KVMERGE_CPU_x86_haswell} AVX_VNNI)
set(KVMERGE_CPU_ARM_armv8.2_2   DOTPROD FP16_VECTOR_ARITHMETIC)
set(KVMERGE_CPU_ARM_armv8.6_1   ${KVMERGE_CPU_ARM_armv8.2_2} SVE MATMUL_INT8)
set(KVMERGE_CPU_ARM_armv8.6_2   ${KVMERGE_CPU_ARM_armv8.6_1} SVE2)

set(KVMERGE_CPU_x86 haswell skylakex icelake)
set(KVMERGE_CPU_ARM armv8.2_2 armv8.6_1 armv8.6_2)

# What /proc/cpuinfo calls the feature that a row has and the row before it lacks.
set(KVMERGE_CPUINFO_haswell  avx2)
set(KVMERGE_CPUINFO_skylakex avx512bw)
set(KVMERGE_CPUINFO_icelake  avx512_vnni)

set(KVMERGE_CPU_MODULES OFF)
if(CMAKE_SYSTEM_NAME STREQUAL "Linux"
   AND CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64|aarch64|arm64)$")
    set(KVMERGE_CPU_MODULES ON)
endif()

# Before llama.cpp is added: choose the defaults; what the user passed with -D stays.
macro(kvmerge_configure_cpu)
    option(GGML_NATIVE "ggml: optimize the build for the current system" OFF)
    if(KVMERGE_CPU_MODULES)
        option(GGML_BACKEND_DL "ggml: build backends as dynamic libraries" ON)
        # See the file there: it is how the variants get added inside upstream's own scope.
        list(PREPEND CMAKE_MODULE_PATH "${PROJECT_SOURCE_DIR}/cmake/upstream")
    endif()
endmacro()

# The highest row that this machine can run, or nothing.
function(kvmerge_host_cpu arch out)
    set(best "")
    if(EXISTS /proc/cpuinfo)
        file(READ /proc/cpuinfo text)
        foreach(name IN LISTS KVMERGE_CPU_${arch})
            if(DEFINED KVMERGE_CPUINFO_${name} AND text MATCHES " ${KVMERGE_CPUINFO_${name}}[ \n]")
                set(best ${name})
            endif()
        endforeach()
    endif()
    set(${out} "${best}" PARENT_SCOPE)
endfunction()

# Called in the scope of ggml/src, before it defines a target. Only the plain `ggml-cpu` is added
# by upstream; it gets no feature at all, or for a developer's build those of this machine.
macro(kvmerge_ggml_begin arch)
    if(GGML_BACKEND_DL AND NOT GGML_CPU_ALL_VARIANTS AND NOT GGML_NATIVE)
        if(KVMERGE_DEV AND "${KVMERGE_CPU_VARIANTS}" STREQUAL "")
            kvmerge_host_cpu(${arch} kvmerge_host)
        else()
            set(kvmerge_host "")
            cmake_language(DEFER CALL kvmerge_add_cpu_variants ${arch})
        endif()
        if("${arch}" STREQUAL "x86")
            foreach(feature SSE42 AVX AVX2 BMI2 AVX_VNNI FMA F16C AVX512 AVX512_VBMI AVX512_VNNI
                    AVX512_BF16 AMX_TILE AMX_INT8 AMX_BF16)
                set(GGML_${feature} OFF)
            endforeach()
            foreach(feature IN LISTS KVMERGE_CPU_x86_${kvmerge_host})
                set(GGML_${feature} ON)
            endforeach()
        endif()
    endif()
endmacro()

# Called in the scope of ggml/src, after it has defined its targets.
function(kvmerge_add_cpu_variants arch)
    set(names ${KVMERGE_CPU_VARIANTS})
    if(NOT names)
        set(names ${KVMERGE_CPU_${arch}})
    endif()
    set(GGML_CPU_ALL_VARIANTS ON) # the way flags are made for a variant
    foreach(name IN LISTS names)
        if(NOT DEFINED KVMERGE_CPU_${arch}_${name})
            message(FATAL_ERROR "KVMERGE_CPU_VARIANTS names '${name}'; known here: ${KVMERGE_CPU_${arch}}")
        endif()
        ggml_add_cpu_backend_variant(${name} ${KVMERGE_CPU_${arch}_${name}})
    endforeach()
endfunction()

# After llama.cpp was added: an upstream that no longer includes the module would silently leave
# the slow baseline alone.
function(kvmerge_check_cpu)
    get_property(begun GLOBAL PROPERTY KVMERGE_GGML_BEGUN)
    if(KVMERGE_CPU_MODULES AND NOT begun)
        message(FATAL_ERROR "ggml/src no longer includes CheckCXXCompilerFlag: find another place to add the CPU variants (cmake/upstream)")
    endif()
endfunction()
