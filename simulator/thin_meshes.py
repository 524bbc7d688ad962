"""Thins the visual meshes of a compiled MuJoCo model, so that drawing in software is about three times faster.

LIBERO's scenes have about 310,000 visible triangles, which is what drawing without a GPU costs. Collision geometry, and
with it every step of the physics, stays as it is. A thinned scene is no longer LIBERO's own picture: train and evaluate
with the same ratio, and never report a LIBERO figure from it.
"""

import numpy as np

from errors import BadInput

SMALLEST_MESH = 400  # triangles; smaller meshes cost nothing and would lose their shape
POSITION_GRID = 1e5  # corners closer than 1/100,000 of the mesh's size are one corner
TEXTURE_GRID = 4096  # texture coordinates are told apart to this many parts of the texture


def thin_visual_meshes(model, ratio: float) -> None:
    """Reduces each mesh that is only ever seen to `ratio` of its triangles, in place and deterministically.

    model: mujoco.MjModel. The surviving triangles are written over the first ones of the mesh and their number is
    lowered, so no array changes its size. Renderers made before must upload the meshes anew.
    """
    for mesh in _visual_only_meshes(model):
        start, count = int(model.mesh_faceadr[mesh]), int(model.mesh_facenum[mesh])
        target = max(SMALLEST_MESH, int(count * ratio))
        if count <= 1.1 * target:
            continue
        faces = slice(start, start + count)
        textured = model.mesh_texcoordadr[mesh] >= 0
        corners = _thinned_corners(
            vertices=_rows(model.mesh_vert, model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]),
            normals=_rows(model.mesh_normal, model.mesh_normaladr[mesh], model.mesh_normalnum[mesh]),
            vertex_of=model.mesh_face[faces].reshape(-1),
            normal_of=model.mesh_facenormal[faces].reshape(-1),
            texture_points=(
                _rows(model.mesh_texcoord, model.mesh_texcoordadr[mesh], model.mesh_texcoordnum[mesh])[
                    model.mesh_facetexcoord[faces].reshape(-1)
                ]
                if textured
                else None
            ),
            target=target,
        )
        kept = slice(start, start + len(corners))
        corner_arrays = [model.mesh_face, model.mesh_facenormal] + ([model.mesh_facetexcoord] if textured else [])
        for array in corner_arrays:
            array[kept] = array[faces].reshape(-1)[corners]
        model.mesh_facenum[mesh] = len(corners)


def _visual_only_meshes(model) -> list[int]:
    import mujoco

    visual: set[int] = set()
    solid: set[int] = set()
    for geom in range(model.ngeom):
        if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH and model.geom_dataid[geom] >= 0:
            touches = model.geom_contype[geom] or model.geom_conaffinity[geom]
            (solid if touches else visual).add(int(model.geom_dataid[geom]))
    return sorted(visual - solid)


def _rows(array: np.ndarray, start: int, count: int) -> np.ndarray:
    return array[int(start) : int(start) + int(count)]


def _thinned_corners(vertices, normals, vertex_of, normal_of, texture_points, target) -> np.ndarray:
    """(F', 3) triangles of the thinned mesh, as indices of corners of the original one.

    A corner is one of the 3F (vertex, normal, texture point) triples of the F triangles. Each new corner is an original
    one, so the textures stay in place. vertices (V, 3), normals (N, 3), vertex_of and normal_of (3F,), texture_points
    (3F, 2) or None.
    """
    try:
        import fast_simplification
    except ModuleNotFoundError as problem:
        raise BadInput(
            f"thinning meshes needs fast-simplification ({problem}); run `pip install -r requirements-meshes.txt`"
        ) from None
    except ImportError as problem:  # it is there, built for another machine
        raise BadInput(f"thinning meshes needs fast-simplification, which cannot be loaded ({problem})") from None

    positions = vertices[vertex_of].astype(np.float64)  # (3F, 3)
    size = np.ptp(positions, axis=0).max() + 1e-12
    # Many meshes are loose triangles: weld corners of equal position and texture point, so that only true borders and
    # seams of the texture stay open.
    grid = np.round(positions / size * POSITION_GRID).astype(np.int64)
    if texture_points is not None:
        grid = np.hstack([grid, np.round(texture_points.astype(np.float64) * TEXTURE_GRID).astype(np.int64)])
    _, first_corner, point_of = np.unique(grid, axis=0, return_index=True, return_inverse=True)
    point_of = point_of.reshape(-1)  # (3F,) welded point of each corner
    points = positions[first_corner].astype(np.float32)
    triangles = point_of.reshape(-1, 3).astype(np.int32)
    a, b, c = triangles.T
    triangles = np.ascontiguousarray(triangles[(a != b) & (b != c) & (a != c)])

    reduction = min(max(1 - target / len(triangles), 0.0), 0.99)
    _, _, collapses = fast_simplification.simplify(
        points, triangles, target_reduction=reduction, agg=5, return_collapses=True
    )
    new_points, new_triangles, new_point_of = fast_simplification.replay_simplification(points, triangles, collapses)
    stand_in = _nearest_original(points, new_points, np.asarray(new_point_of))
    triangles = stand_in[np.asarray(new_triangles)]  # (F', 3) welded points
    edges = points[triangles[:, 1:]].astype(np.float64) - points[triangles[:, :1]]
    face_normals = np.cross(edges[:, 0], edges[:, 1])
    areas = np.linalg.norm(face_normals, axis=1)
    flat = areas <= 1e-14 * size * size
    triangles, face_normals = triangles[~flat], face_normals[~flat] / areas[~flat, None]
    return _best_corners(triangles, face_normals, point_of, normals[normal_of])


def _nearest_original(points, new_points, new_point_of) -> np.ndarray:
    """(P',) for each new point the nearest of the original points that were merged into it. new_point_of (P,)."""
    distance = np.linalg.norm(points - new_points[new_point_of], axis=1)
    order = np.lexsort((distance, new_point_of))
    merged, first = np.unique(new_point_of[order], return_index=True)
    stand_in = np.zeros(len(new_points), dtype=int)
    stand_in[merged] = order[first]
    return stand_in


def _best_corners(triangles, face_normals, point_of, corner_normals) -> np.ndarray:
    """(F', 3) for each new corner the corner of its point whose normal fits the new triangle best: edges stay sharp."""
    corners = np.argsort(point_of, kind="stable")  # corners, grouped by point
    starts = np.searchsorted(point_of[corners], np.arange(point_of.max() + 2))
    points = triangles.reshape(-1)
    counts = starts[points + 1] - starts[points]
    wanted = np.repeat(np.arange(len(points)), counts)  # which new corner each candidate is for
    offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    candidates = corners[starts[points][wanted] + offsets]
    fit = np.einsum("ij,ij->i", corner_normals[candidates], face_normals[wanted // 3])
    order = np.lexsort((-fit, wanted))
    _, best = np.unique(wanted[order], return_index=True)
    return candidates[order[best]].reshape(-1, 3)
