# Upstream's web interface, built with npm from the pinned source and embedded in llama-server as upstream does it, with
# our own page beside it as kv.html.

# `kvmerge serve` knows by this file beside the program that it has the interface.
set(KVMERGE_INTERFACE_FILE web-interface.json)

# A folder that stands in for upstream's tools/ui: the tree itself stays as it was unpacked.
function(kvmerge_interface_sources llama_cpp_dir out)
    find_program(KVMERGE_NPM NAMES npm.cmd npm) # on Windows the other one is a script for a shell
    if(NOT KVMERGE_NPM)
        message(FATAL_ERROR "KVMERGE_WEB_INTERFACE builds upstream's web interface with npm, which was not found. Install "
            "Node.js 20.19 or later, or leave the option off: then the server shows a page of kvmerge's own.")
    endif()
    set(copy "${CMAKE_BINARY_DIR}/interface")
    file(COPY "${llama_cpp_dir}/tools/ui/" DESTINATION "${copy}")
    configure_file("${KVMERGE_SOURCE_DIR}/python/kvmerge/page/index.html" "${copy}/static/kv.html" COPYONLY)
    set(${out} "${copy}" PARENT_SCOPE)
endfunction()

# Upstream only warns where npm fails, and makes a server without a page: here that is an error.
function(kvmerge_ship_interface)
    set(built "${CMAKE_BINARY_DIR}/llama.cpp/tools/ui/dist/build.json")
    set(named "${CMAKE_BINARY_DIR}/${KVMERGE_INTERFACE_FILE}")
    if(KVMERGE_DEV)
        set(named "${KVMERGE_DEV_LIBRARIES}/${KVMERGE_INTERFACE_FILE}")
    endif()
    add_custom_target(kvmerge-interface
        COMMAND ${CMAKE_COMMAND} -E copy "${built}" "${named}"
        COMMENT "Looking for upstream's web interface, which npm builds"
        VERBATIM)
    add_dependencies(kvmerge-interface llama-ui-assets)
    add_dependencies(llama-server kvmerge-interface)
    foreach(destination IN LISTS kvmerge_destinations)
        install(FILES "${named}" DESTINATION "${destination}/lib" COMPONENT kvmerge)
    endforeach()
endfunction()
