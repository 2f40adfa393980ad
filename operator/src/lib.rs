//! The operator of birb-nest: reconciles `BirbNest` resources into running nests.
