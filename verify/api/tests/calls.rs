//! Runs the calls of this package's library, which check their results.

macro_rules! run {
    ($($module:ident: $($(#[$condition:meta])? $function:ident)*;)*) => {
        $(mod $module {
            $(#[test]
            $(#[$condition])?
            fn $function() -> impl std::process::Termination {
                verify_api::$module::$function()
            })*
        })*
    };
}

run! {
    addresses: guest_address region_address own_address;
    bitmaps: atomic_bitmap slices own_bitmap;
    enums: all;
    generic: all;
    mappings: region region_as_mapping mapping with_files
        #[cfg(unix)] mapping_of_unix #[cfg(unix)] built;
    memories: made looked_up iterated accessed behind_pointers deprecated extended;
    own_memory: registers slots shifted;
    own_values: structures atomics;
    streams: host_memory #[cfg(unix)] files #[cfg(unix)] sockets own_streams;
    swapped: address_spaces replaced;
    translated: iotlb iommu_memory iommu_memory_swapped;
    values: byte_valued endian atomics atomic_access;
    volatile: slice converted reference array errors;
}
