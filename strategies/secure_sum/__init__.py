"""Secure aggregation: the coordinator learns the sum of the sites' noised updates, and no single one.

After Bonawitz et al. (2017), "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS,
Figure 4 with its additions against an active coordinator. Five steps, each a question of the coordinator and
the answer of the sites; any site may be silent from any step on, as long as ``threshold`` are left:

=======  ===========================  ==========================================================
step     coordinator to site          site to coordinator
=======  ===========================  ==========================================================
offer    `Terms`                      `KeyOffer`: two fresh X25519 keys, signed by the site's key
deal     all `KeyOffer`               a `SealedShare` for every site: parts of its two secrets
mask     its `SealedShare`            its update in fixed point under all masks
consent  who was summed               `Consent`: signed, once for all attempts at this update
reveal   all `Consent`                `Reveal`: what removes the masks of the sum
=======  ===========================  ==========================================================

``site.SiteSession`` is the site's half, ``coordinator.SecureSum`` the coordinator's. The messages are plain
frozen dataclasses of text and numbers, fit for JSON; how they travel is not decided here.
"""
