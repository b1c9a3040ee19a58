# llama-server: upstream's own with hooks that call cpp/server, one program beside the libraries with its common parts
# linked in.

function(kvmerge_add_server llama_cpp_dir)
    set(BUILD_SHARED_LIBS OFF)
    set(LLAMA_TOOLS_INSTALL OFF)
    set(LLAMA_BUILD_UI ${KVMERGE_WEB_INTERFACE})
    # HTTPS ties the program to one version of OpenSSL: a proxy in front of it brings that too.
    set(LLAMA_OPENSSL ${KVMERGE_OPENSSL})
    if(KVMERGE_OPENSSL)
        find_package(OpenSSL REQUIRED) # upstream would only warn
    endif()
    set(PROJECT_SOURCE_DIR "${llama_cpp_dir}") # what the parts below take to be their own project

    # Upstream adds them itself where all of its tools, or its tests, are built.
    set(parts vendor/cpp-httplib=cpp-httplib common=llama-common tools/ui=llama-ui tools/server=llama-server)
    foreach(part IN LISTS parts)
        string(REGEX MATCH "(.*)=(.*)" part "${part}")
        set(folder "${CMAKE_MATCH_1}")
        set(source "${llama_cpp_dir}/${folder}")
        if(NOT TARGET ${CMAKE_MATCH_2})
            if(KVMERGE_WEB_INTERFACE AND folder STREQUAL "tools/ui")
                kvmerge_interface_sources("${llama_cpp_dir}" source)
            endif()
            add_subdirectory("${source}" "llama.cpp/${folder}" EXCLUDE_FROM_ALL)
        endif()
    endforeach()

    file(GLOB sources CONFIGURE_DEPENDS "${KVMERGE_SOURCE_DIR}/cpp/server/*.cpp" "${KVMERGE_SOURCE_DIR}/cpp/server/*.h")
    target_sources(server-context PRIVATE ${sources})
    target_include_directories(server-context PRIVATE
        "${KVMERGE_SOURCE_DIR}/cpp/server" "${KVMERGE_SOURCE_DIR}/cpp/include")

    target_link_libraries(server-context PRIVATE cpp-httplib) # it fetches, with HTTPS where that is built in
    target_include_directories(llama-server-impl PRIVATE "${KVMERGE_SOURCE_DIR}/cpp/server")

    if(KVMERGE_BUILD_TOOLS)
        target_sources(llama-mtmd-cli PRIVATE
            "${KVMERGE_SOURCE_DIR}/cpp/server/kvmerge-cli.cpp"
            "${KVMERGE_SOURCE_DIR}/cpp/server/kvmerge-program.cpp"
            "${KVMERGE_SOURCE_DIR}/cpp/server/kvmerge-flags.cpp")
        target_include_directories(llama-mtmd-cli PRIVATE
            "${KVMERGE_SOURCE_DIR}/cpp/server" "${KVMERGE_SOURCE_DIR}/cpp/include")
        return()
    endif()

    # Most of the common parts is never called.  Upstream's tests do call them, in a library of their own.
    if(NOT MSVC AND NOT KVMERGE_BUILD_UPSTREAM_TESTS)
        foreach(target cpp-httplib llama-common-base llama-common server-context llama-ui llama-server-impl)
            target_compile_options(${target} PRIVATE -ffunction-sections -fdata-sections -fvisibility=hidden)
        endforeach()
        target_link_options(llama-server PRIVATE
            $<IF:$<PLATFORM_ID:Darwin>,LINKER:-dead_strip,LINKER:--gc-sections>)
    endif()

    # It finds the libraries and the back ends beside itself.
    set_target_properties(llama-server PROPERTIES
        EXCLUDE_FROM_ALL OFF
        BUILD_WITH_INSTALL_RPATH ON
        INSTALL_RPATH "${kvmerge_rpath}")
    if(KVMERGE_DEV)
        set_target_properties(llama-server PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${KVMERGE_DEV_LIBRARIES}")
    endif()
    if(KVMERGE_WEB_INTERFACE)
        kvmerge_ship_interface()
    elseif(KVMERGE_DEV)
        file(REMOVE "${KVMERGE_DEV_LIBRARIES}/${KVMERGE_INTERFACE_FILE}")
    endif()
    foreach(destination IN LISTS kvmerge_destinations)
        install(TARGETS llama-server RUNTIME DESTINATION "${destination}/lib" COMPONENT kvmerge)
    endforeach()
endfunction()
