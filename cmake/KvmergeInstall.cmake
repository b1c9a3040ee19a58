# Collects every shared library that llama.cpp built, and installs them where the package looks, with
# the Python layer that was made for them.

function(kvmerge_shared_libraries dir out)
    set(found "")
    get_property(targets DIRECTORY "${dir}" PROPERTY BUILDSYSTEM_TARGETS)
    foreach(target IN LISTS targets)
        get_target_property(type ${target} TYPE)
        if(type STREQUAL "SHARED_LIBRARY" OR type STREQUAL "MODULE_LIBRARY")
            list(APPEND found ${target})
        endif()
    endforeach()
    get_property(subdirs DIRECTORY "${dir}" PROPERTY SUBDIRECTORIES)
    foreach(subdir IN LISTS subdirs)
        kvmerge_shared_libraries("${subdir}" below)
        list(APPEND found ${below})
    endforeach()
    set(${out} "${found}" PARENT_SCOPE)
endfunction()

kvmerge_shared_libraries("${llama_cpp_dir}" kvmerge_libraries)

if(APPLE)
    set(kvmerge_rpath "@loader_path")
else()
    set(kvmerge_rpath "$ORIGIN")
endif()

foreach(target IN LISTS kvmerge_libraries)
    # A wheel has no symbolic links: each library has one name, and finds the others beside it.
    set_property(TARGET ${target} PROPERTY VERSION)
    set_property(TARGET ${target} PROPERTY SOVERSION)
    set_property(TARGET ${target} PROPERTY PUBLIC_HEADER)
    set_property(TARGET ${target} PROPERTY PRIVATE_HEADER)
    set_target_properties(${target} PROPERTIES
        BUILD_WITH_INSTALL_RPATH ON
        INSTALL_RPATH "${kvmerge_rpath}")
    if(KVMERGE_SANITIZE)
        set_target_properties(${target} PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/lib")
    elseif(KVMERGE_DEV)
        set_target_properties(${target} PROPERTIES
            LIBRARY_OUTPUT_DIRECTORY "${KVMERGE_DEV_LIBRARIES}")
    endif()
endforeach()

set(kvmerge_destinations kvmerge)
if(SKBUILD_STATE STREQUAL "editable")
    # The package is imported from the source tree, and looks for its libraries beside itself.
    list(APPEND kvmerge_destinations "${PROJECT_SOURCE_DIR}/python/kvmerge")
endif()
set(kvmerge_shipped ${kvmerge_libraries})
list(FILTER kvmerge_shipped EXCLUDE REGEX "^llama-") # parts of the tools
foreach(destination IN LISTS kvmerge_destinations)
    install(TARGETS ${kvmerge_shipped}
        LIBRARY DESTINATION "${destination}/lib" COMPONENT kvmerge
        RUNTIME DESTINATION "${destination}/lib" COMPONENT kvmerge
        ARCHIVE DESTINATION "${destination}/lib" COMPONENT kvmerge-development)
    install(DIRECTORY "${PROJECT_SOURCE_DIR}/cpp/include/"
        DESTINATION "${destination}/include" COMPONENT kvmerge OPTIONAL)
endforeach()

# The Python layer, as it is in the pinned release. An installed llama-cpp-python of another build
# would compile its own llama.cpp.
kvmerge_python_layer_dir("${llama_cpp_dir}" kvmerge_python_layer)
foreach(destination IN LISTS kvmerge_destinations)
    install(DIRECTORY "${kvmerge_python_layer}" DESTINATION "${destination}/_vendor" COMPONENT kvmerge
        PATTERN "__pycache__" EXCLUDE)
    install(FILES "${kvmerge_python_layer}/../LICENSE.md" DESTINATION "${destination}/_vendor/llama_cpp"
        COMPONENT kvmerge)
endforeach()
if(KVMERGE_DEV)
    set(kvmerge_vendor_dir "${PROJECT_SOURCE_DIR}/python/kvmerge/_vendor")
    file(REMOVE_RECURSE "${kvmerge_vendor_dir}")
    file(COPY "${kvmerge_python_layer}" DESTINATION "${kvmerge_vendor_dir}" PATTERN "__pycache__" EXCLUDE)
    file(COPY "${kvmerge_python_layer}/../LICENSE.md" DESTINATION "${kvmerge_vendor_dir}/llama_cpp")
endif()
