# Where the llama.cpp tree comes from.

get_filename_component(KVMERGE_SOURCE_DIR "${CMAKE_CURRENT_LIST_DIR}/.." ABSOLUTE)
find_package(Python3 3.10 COMPONENTS Interpreter REQUIRED)

function(kvmerge_prepare out)
    execute_process(
        COMMAND "${Python3_EXECUTABLE}" "${KVMERGE_SOURCE_DIR}/vendor/prepare.py" ${ARGN}
        RESULT_VARIABLE status
        OUTPUT_VARIABLE output
        ERROR_VARIABLE  problem
        OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(NOT status EQUAL 0)
        message(FATAL_ERROR "${problem}")
    endif()
    set(${out} "${output}" PARENT_SCOPE)
endfunction()

# Sets `out` to the user's own tree when there is one, else to the patched tree, made when missing.
function(kvmerge_llama_cpp_dir out)
    if(KVMERGE_LLAMA_CPP_DIR)
        get_filename_component(dir "${KVMERGE_LLAMA_CPP_DIR}" ABSOLUTE BASE_DIR "${CMAKE_BINARY_DIR}")
        kvmerge_prepare(ignored --check "${dir}")
    else()
        set(options "")
        if(KVMERGE_BUILD_UPSTREAM_TESTS)
            set(options --full)
        endif()
        kvmerge_prepare(dir ${options})

        # A changed pin or patch makes another tree.
        file(GLOB series CONFIGURE_DEPENDS "${KVMERGE_SOURCE_DIR}/vendor/patches/*")
        set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
            ${series} "${KVMERGE_SOURCE_DIR}/vendor/requirements.txt")
    endif()
    message(STATUS "llama.cpp: ${dir}")
    set(${out} "${dir}" PARENT_SCOPE)
endfunction()

# Sets `out` to the folder of llama_cpp, the Python layer of the pinned release. `llama_cpp_dir` is
# what the function above has set.
function(kvmerge_python_layer_dir llama_cpp_dir out)
    if(KVMERGE_LLAMA_CPP_DIR)
        kvmerge_prepare(llama_cpp_dir --pristine) # the user's own tree has no such layer beside it
    endif()
    get_filename_component(dir "${llama_cpp_dir}/../../llama_cpp" ABSOLUTE)
    if(NOT EXISTS "${dir}/__init__.py")
        message(FATAL_ERROR "The Python layer of llama-cpp-python is not in ${dir}: delete the folder "
            "around it, and it is unpacked again.")
    endif()
    set(${out} "${dir}" PARENT_SCOPE)
endfunction()
