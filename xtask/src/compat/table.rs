//! The published crates, and the number of their tests that pass with vm-memory 0.18.0 from the
//! registry (on x86_64 Linux).

/// A published crate, and the features of its tests.
#[derive(Debug)]
pub struct User {
    /// Its name in the registry.
    pub name: &'static str,
    /// The version whose tests were counted.
    pub version: &'static str,
    /// A suffix that distinguishes rows of the same crate.
    pub variant: Option<&'static str>,
    /// The features, separated by commas. Empty for the default features.
    pub features: &'static str,
    /// Unit, integration and documentation tests that pass on the registry's vm-memory.
    pub expected: u64,
    /// Parts of the names of the skipped tests.
    pub skips: &'static [&'static str],
    /// The reason why they are skipped.
    pub reason: &'static str,
    /// The tools that the build needs besides Rust and a C compiler.
    pub needs: &'static str,
}

impl User {
    /// Returns the name of the folder of its copy.
    pub fn folder(&self) -> String {
        format!("{}-{}", self.name, self.version)
    }

    /// Returns the name of the row: the crate, and the variant if it has one.
    pub fn label(&self) -> String {
        match self.variant {
            Some(variant) => format!("{}-{variant}", self.name),
            None => self.name.to_owned(),
        }
    }
}

/// Returns a row with the default features, whose tests all run.
const fn user(name: &'static str, version: &'static str, expected: u64) -> User {
    User {
        name,
        version,
        variant: None,
        features: "",
        expected,
        skips: &[],
        reason: "",
        needs: "",
    }
}

/// The crates, as published. A new version needs a new count (`cargo xtask compat --published`).
pub const USERS: &[User] = &[
    User {
        features: "test-utils",
        ..user("virtio-queue", "0.18.0", 58)
    },
    User {
        variant: Some("xen"),
        features: "test-utils,vm-memory/xen",
        ..user("virtio-queue", "0.18.0", 58)
    },
    user("virtio-vsock", "0.12.0", 10),
    User {
        variant: Some("xen"),
        features: "vm-memory/xen",
        ..user("virtio-vsock", "0.12.0", 10)
    },
    user("linux-loader", "0.14.0", 51),
    User {
        variant: Some("bzimage"),
        features: "bzimage,elf,pe",
        skips: &["test_load_bzImage", "bzimage::BzImage"],
        reason: "the kernel image that they load is not published with the crate",
        ..user("linux-loader", "0.14.0", 52)
    },
    User {
        features:
            "vhost-user,vhost-user-frontend,vhost-user-backend,vhost-kern,vhost-net,vhost-vdpa,vhost-vsock,\
                   test-utils,postcopy",
        skips: &["vhost_kern::net", "vhost_kern::vsock"],
        reason: "they need /dev/vhost-net and /dev/vhost-vsock",
        ..user("vhost", "0.18.0", 100)
    },
    User {
        variant: Some("xen"),
        features:
            "vhost-user,vhost-user-frontend,vhost-user-backend,vhost-kern,vhost-net,vhost-vdpa,vhost-vsock,\
                   test-utils,xen",
        skips: &["vhost_kern::net", "vhost_kern::vsock"],
        reason: "they need /dev/vhost-net and /dev/vhost-vsock",
        ..user("vhost", "0.18.0", 99)
    },
    User {
        features: "postcopy",
        needs: "libclang: apt-get install libclang-dev, or its folder in LIBCLANG_PATH",
        ..user("vhost-user-backend", "0.24.0", 29)
    },
    User {
        variant: Some("xen"),
        features: "xen",
        needs: "libclang: apt-get install libclang-dev, or its folder in LIBCLANG_PATH",
        ..user("vhost-user-backend", "0.24.0", 27)
    },
    User {
        features: "vm-memory",
        ..user("imago", "0.2.6", 76)
    },
    user("vfio-ioctls", "0.10.0", 32),
    user("vfio_user", "0.1.7", 9),
];

/// Returns the names of the crates, each once.
pub fn names() -> Vec<&'static str> {
    let mut names: Vec<_> = USERS.iter().map(|user| user.name).collect();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::{names, USERS};
    use std::collections::HashSet;

    #[test]
    fn labels_of_users_are_unique() {
        let labels: HashSet<_> = USERS.iter().map(super::User::label).collect();
        assert_eq!(labels.len(), USERS.len());
    }

    #[test]
    fn names_of_crates_are_unique() {
        let unique: HashSet<_> = names().into_iter().collect();
        assert_eq!(unique.len(), names().len());
    }

    #[test]
    fn users_with_skips_have_a_reason() {
        for user in USERS {
            assert_eq!(
                user.skips.is_empty(),
                user.reason.is_empty(),
                "{}",
                user.name
            );
        }
    }
}
