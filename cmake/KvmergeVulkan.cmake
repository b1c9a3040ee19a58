# What ggml's Vulkan back end needs, asked for before anything is compiled: its shaders take minutes, and what is missing or
# too old shows only after them.

# The newest names of the C++ headers that the back end uses, each with the file that has it. Headers of 1.4.309 have them.
set(KVMERGE_VULKAN_NAMES
    "vulkan_structs.hpp:struct LayerSettingEXT"
    "vulkan_enums.hpp:eMesaHoneykrisp")

function(kvmerge_check_vulkan)
    if(NOT GGML_VULKAN)
        return()
    endif()

    if(DEFINED ENV{VULKAN_SDK})
        list(APPEND CMAKE_PREFIX_PATH "$ENV{VULKAN_SDK}")
    endif()
    find_package(Vulkan QUIET COMPONENTS glslc)
    find_package(SPIRV-Headers CONFIG QUIET)

    set(sdk "or LunarG's Vulkan SDK, https://vulkan.lunarg.com, with VULKAN_SDK set to its folder")

    if(NOT Vulkan_LIBRARY OR NOT EXISTS "${Vulkan_INCLUDE_DIR}/vulkan/vulkan.hpp")
        message(FATAL_ERROR "The Vulkan back end needs Vulkan's C++ headers and loader, which were not found. Install them "
            "(apt install libvulkan-dev, dnf install vulkan-headers vulkan-loader-devel, pacman -S vulkan-devel), ${sdk}.")
    endif()

    foreach(entry IN LISTS KVMERGE_VULKAN_NAMES)
        string(REGEX MATCH "^([^:]+):(.*)$" ignored "${entry}")
        set(file "${CMAKE_MATCH_1}")
        set(name "${CMAKE_MATCH_2}")
        set(found "")
        if(EXISTS "${Vulkan_INCLUDE_DIR}/vulkan/${file}")
            file(STRINGS "${Vulkan_INCLUDE_DIR}/vulkan/${file}" found REGEX "${name}" LIMIT_COUNT 1)
        endif()
        if(NOT found)
            message(FATAL_ERROR "The Vulkan headers in ${Vulkan_INCLUDE_DIR} (${Vulkan_VERSION}) are too old for this llama.cpp: "
                "${file} has no `${name}`. Headers of 1.4.309 or later have it, and an older loader will do: install newer ones "
                "(libvulkan-dev of Debian 13 or Ubuntu 25.04 and later, ${sdk}), or unpack such a package "
                "(dpkg-deb -x libvulkan-dev_….deb folder) and pass -DVulkan_INCLUDE_DIR=folder/usr/include.")
        endif()
    endforeach()

    if(NOT Vulkan_GLSLC_EXECUTABLE)
        message(FATAL_ERROR "The Vulkan back end compiles its shaders with glslc, which was not found. Install it "
            "(apt install glslc, dnf install glslc, pacman -S shaderc), ${sdk}, or name it with -DVulkan_GLSLC_EXECUTABLE=path.")
    endif()

    # what upstream's shaders are compiled for
    set(shader "${CMAKE_CURRENT_BINARY_DIR}/kvmerge-glslc.comp")
    file(WRITE "${shader}" "#version 450\n#extension GL_EXT_control_flow_attributes : enable\n"
        "#extension GL_EXT_shader_16bit_storage : require\n#extension GL_KHR_shader_subgroup_arithmetic : require\n"
        "void main() {}\n")
    execute_process(
        COMMAND "${Vulkan_GLSLC_EXECUTABLE}" -fshader-stage=compute --target-env=vulkan1.3 -o "${shader}.spv" "${shader}"
        RESULT_VARIABLE status ERROR_VARIABLE problem OUTPUT_QUIET)
    if(NOT status EQUAL 0)
        message(FATAL_ERROR "${Vulkan_GLSLC_EXECUTABLE} does not compile for Vulkan 1.3, so it is too old for the Vulkan back "
            "end's shaders: install glslc 2022.3 or later, ${sdk}. It says: ${problem}")
    endif()

    if(NOT SPIRV-Headers_FOUND)
        message(FATAL_ERROR "The Vulkan back end needs the SPIR-V headers, which were not found. Install them "
            "(apt install spirv-headers, dnf install spirv-headers-devel, pacman -S spirv-headers), ${sdk}.")
    endif()
endfunction()
